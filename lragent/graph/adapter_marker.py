"""Finds adapted modules in a captured graph."""

from __future__ import annotations

import torch
from torch import fx

from lragent.loading import adapter_hook as adapter_hook  # registers the marker op

ADAPTER_MARKER = torch.ops.lragent.adapter_marker.default


def adapter_markers(graph: fx.GraphModule) -> list[fx.Node]:
    """Calls of adapted modules in graph order; arguments: input, output without adapter, FQN."""
    return list(graph.graph.find_nodes(op="call_function", target=ADAPTER_MARKER, sort=True))
