"""Finding attention calls in a captured graph."""

from __future__ import annotations

import torch
from torch import fx

from lragent.kernels import ops  # registers the marker op

MARKER = ops.attention_marker._opoverload


def marker_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """Attention calls in graph order."""
    assert MARKER is torch.ops.lragent.attention_marker.default
    return [n for n in graph.graph.nodes if n.target is MARKER]


def has_slopes(marker: fx.Node) -> bool:
    """Whether its scores have a bias by the key's position (ALiBi)."""
    return len(marker.args) > 8 and marker.args[8] is not None
