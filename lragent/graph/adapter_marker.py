"""Finds adapted modules in a captured graph."""

from __future__ import annotations

from torch import fx

from lragent.loading.adapter_hook import adapter_marker  # registers the marker op

ADAPTER_MARKER = adapter_marker._opoverload


def adapter_markers(graph: fx.GraphModule) -> list[fx.Node]:
    """Calls of adapted modules in graph order; arguments: input, output without adapter, FQN."""
    return list(graph.graph.find_nodes(op="call_function", target=ADAPTER_MARKER, sort=True))
