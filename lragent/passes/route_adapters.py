"""Adapter markers become two GEMMs for all agents, routed per token by `agent_ids`.

Before (one marker per adapted module):          After:
    y  = linear(x, W)           [1, T, out]          y   = linear(x, W)                          [1, T, out]
    y2 = adapter_marker(x, y)   [1, T, out]          lr  = linear(x, A_cat, ones)                [1, T, R]
                                                     own = index_select(lr, 2, index) * route[agent_ids]
                                                     d   = matmul(own, B_cat)                    [1, T, out]
                                                     y2  = add(y * gain[agent_ids], d)

A_cat holds each distinct A once; R is the sum of their ranks. `index` repeats the LR numbers for agents that share an
A. `route` `[N + 1, sum of ranks]` is 1 where an LR number belongs to the agent; its row 0, base, is zero. Scaling and
gain are folded into B_cat. `ones` exists if an adapter has a bias, `gain` if one is a DoRA. For an embedding,
`linear(x, A)` is `embedding(A, x)`. Rows of the weight that an agent replaces are applied last (`agent_rows.py`). A
projection that is called twice is routed twice.
"""

from __future__ import annotations

import torch
from torch import fx

from lragent.errors import Miss
from lragent.graph.adapter_marker import adapter_markers
from lragent.graph.fx_tools import add_constant, add_shared_constant, emit, placeholder
from lragent.graph.passes import Pass, PassReport
from lragent.passes.adapters.agent_rows import replace_rows
from lragent.passes.adapters.stack import gains, low_rank_stream, stack
from lragent.passes.contract import ROUTED, RewriteContext, RoutedLinear
from lragent.passes.select_logits import ROWS
from lragent.program.adapter_map import RoutedConstants
from lragent.program.cache_schema import LowRankStream

aten = torch.ops.aten
AGENT_IDS = "agent_ids"
# Constants that map agents to their part of the LR stream. Lowering passes may write their values into the code.
GATHER_INDEX, ROUTE = "lora_gather_index", "lora_route"


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    markers = adapter_markers(graph)
    misses = tuple(
        Miss(str(m.args[2]), m.name, "its rows are not the tokens in their order, so they can't be routed by agent")
        for m in markers
        if not _rows_are_tokens(m)
    )
    missed = {miss.node for miss in misses}
    routable = [m for m in markers if m.name not in missed]
    if not routable:
        return PassReport(0, misses)
    agent_ids = placeholder(graph, AGENT_IDS)
    if agent_ids is None:
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        with graph.graph.inserting_after(inputs[-1]):
            agent_ids = graph.graph.placeholder(AGENT_IDS)
    for index, marker in enumerate(routable):
        _rewrite(graph, context, index, marker, agent_ids)
    return PassReport(len(routable), misses)


def _rows_are_tokens(node: fx.Node) -> bool:
    """True if a value is `[1, ..., 1, T, C]`."""
    ids = next((n for n in node.graph.find_nodes(op="placeholder") if n.target == "input_ids"), None)
    value = node.meta.get("val")
    if ids is None or value is None:
        return True
    *ones, rows, _ = value.shape
    return str(rows) == str(ids.meta["val"].shape[1]) and all(str(size) == "1" for size in ones)


def _rewrite(graph: fx.GraphModule, context: RewriteContext, index: int, marker: fx.Node, agent_ids: fx.Node) -> None:
    x, base, module = marker.args
    assert isinstance(x, fx.Node) and isinstance(base, fx.Node) and isinstance(module, str)
    adapters, rows = context.adapters.get(module, {}), context.rows.get(module, {})
    alone = tuple(range(len(context.agents)))
    stream = low_rank_stream(module, context.agents, adapters, context.groups.get(module, alone))
    gain_NC = gains(context.agents, adapters)
    low_rank, total = None, base
    with graph.graph.inserting_before(marker):
        ids = _ids_of_rows(graph, x, agent_ids)
        if gain_NC is not None:
            gain = emit(graph, aten.index_select.default, add_constant(graph, f"lora_gain_{index}", gain_NC), 0, ids)
            total = emit(graph, aten.mul.Tensor, base, gain)
        if adapters:
            low_rank, delta = _low_rank(graph, context, index, marker, stream, ids)
            total = emit(graph, aten.add.Tensor, total, delta)
        if rows:
            tokens = context.embeddings.get(module)
            width = tokens or marker.meta["val"].shape[-1]
            total = replace_rows(
                graph, f"lora_rows_{index}", context.agents, rows, x, total, ids, width, tokens is not None
            )
    total.meta["val"] = marker.meta.get("val")
    total.meta[ROUTED] = RoutedLinear(module, base, low_rank, stream, gain_NC, bool(rows))
    marker.replace_all_uses_with(total)
    graph.graph.erase_node(marker)


def _low_rank(
    graph: fx.GraphModule, context: RewriteContext, index: int, marker: fx.Node, stream: LowRankStream, ids: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Adds `x @ A_cat.T` and the delta at the insertion point and returns their nodes."""
    x, _, module = marker.args
    assert isinstance(module, str)
    a_cat, b_cat, index_of_lr, route, ones = stack(stream, context.agents, context.adapters[module])
    embeds = module in context.embeddings
    a_node = add_constant(graph, f"lora_a_{index}", a_cat.T if embeds else a_cat)
    ones_node = None if ones is None else add_constant(graph, f"lora_ones_{index}", ones)
    if embeds:
        low_rank = emit(graph, aten.embedding.default, a_node, x)
        if ones_node is not None:
            low_rank = emit(graph, aten.add.Tensor, low_rank, ones_node)
    else:
        bias = () if ones_node is None else (ones_node,)
        low_rank = emit(graph, aten.linear.default, x, a_node, *bias)
    own = low_rank
    if not torch.equal(index_of_lr, torch.arange(a_cat.shape[0])):
        index_node = add_shared_constant(graph, GATHER_INDEX, index_of_lr)
        own = emit(graph, aten.index_select.default, low_rank, marker.meta["val"].dim() - 1, index_node)
    route_node = add_shared_constant(graph, ROUTE, route)
    mask = emit(graph, aten.index_select.default, route_node, 0, ids)
    own = emit(graph, aten.mul.Tensor, own, mask)
    b_node = add_constant(graph, f"lora_b_{index}", b_cat)
    context.state.routed.append(RoutedConstants(index, stream, embeds, outputs=b_cat.shape[1]))
    return low_rank, emit(graph, aten.matmul.default, own, b_node)


def _ids_of_rows(graph: fx.GraphModule, x: fx.Node, agent_ids: fx.Node) -> fx.Node:
    """Agent ids of the rows of x: of all tokens, or of the sampled rows if `select_logits` reduced x to them."""
    rows = placeholder(graph, ROWS)
    if rows is not None and x.target is aten.index_select.default and x.args[2] is rows:
        return emit(graph, aten.index_select.default, agent_ids, 0, rows)
    return agent_ids


ROUTE_ADAPTERS = Pass(
    "route_adapters", _run, required=True, hint="Leave these modules out of the adapters' target_modules."
)
