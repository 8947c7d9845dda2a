"""Finds attention calls in a captured graph and reads their arguments."""

from __future__ import annotations

from torch import fx

from lragent.graph.fx_tools import argument, calls
from lragent.kernels.ops import attention_marker

# Arguments of the marker op.
QUERY, KEY, VALUE = "query_1HqTDk", "key_1HTDk", "value_1HTDv"


def marker_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """Attention calls in graph order."""
    return list(calls(graph, attention_marker))


def has_slopes(marker: fx.Node) -> bool:
    """True if the call has ALiBi slopes."""
    return argument(marker, "slopes_Hq") is not None
