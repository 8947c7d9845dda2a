"""Replaces attention ops by the implementation chosen for the target.

Before:                                    After (attention="torch"):
    o = flash_lora_attention(q, ...)           o = flash_lora_attention_torch(q, ...)

If the implementation has no norm over all heads, layers with such a norm run `FALLBACK`, and the pass reports each of
them (`lragent.kernels.implementations`).
"""

from __future__ import annotations

from torch import fx

from lragent.errors import Miss
from lragent.graph.fx_tools import argument, calls, fetch
from lragent.graph.passes import Pass, PassReport
from lragent.kernels import ops
from lragent.kernels.implementations import FALLBACK, GRAPHS, IMPLEMENTATION_OF
from lragent.passes.contract import LowerContext


def _run(graph: fx.GraphModule, context: LowerContext) -> PassReport:
    misses = fallback_layers(graph, context.attention)
    missed = {miss.node for miss in misses}
    nodes = _attention_nodes(graph)
    for node in nodes:
        node.target = GRAPHS[FALLBACK if node.name in missed else context.attention].target
    return PassReport(len(nodes), misses)


def fallback_layers(graph: fx.GraphModule, attention: str) -> tuple[Miss, ...]:
    """Layers of a graph before lowering that will run `FALLBACK`; `attention` is the name of an attention graph."""
    if IMPLEMENTATION_OF[attention].wide_norms:
        return ()
    return tuple(
        Miss(f"layer {index}", node.name, f"{attention} has no norm over all heads; runs {FALLBACK}")
        for index, node in enumerate(_attention_nodes(graph))
        if _has_wide_norm(graph, node)
    )


def _attention_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return list(calls(graph, ops.flash_lora_attention))


def _has_wide_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    weight = argument(node, "norm_weight")
    return isinstance(weight, fx.Node) and fetch(graph, weight).dim() == 2


LOWER_ATTENTION = Pass("lower_attention", _run)
