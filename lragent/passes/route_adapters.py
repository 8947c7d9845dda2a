"""All agents' adapters on a projection become two GEMMs, chosen per token by `agent_ids`.

Before (one chain per adapted module):           After:
    y  = linear(x, W)           [1, T, out]          y   = linear(x, W)                          [1, T, out]
    a  = linear(x, A)           [1, T, 1]            lr  = linear(x, A_cat, ones)                [1, T, R]
    b  = linear(a, B)           [1, T, out]          own = index_select(lr, 2, columns) * route[agent_ids]
    s  = mul(b, scaling)                             d   = matmul(own, B_cat)                    [1, T, out]
    y2 = add(y, s)                                   y2  = add(y * gain[agent_ids], d)

R counts each distinct A once; `columns` gives every agent its own ranks again; `route` `[N + 1, sum of ranks]` is 1
where a column belongs to the agent (row 0 = base: all zero). Scaling and gain are folded into B_cat. `ones` and `gain`
appear where an adapter has a bias or is a DoRA. Of an embedding, `linear(x, A)` is `embedding(A, x)`. Outputs that an
agent has rows of its own for are put in place last (`agent_rows.py`). Chains are found by the tensors they use,
never by names; a projection called twice is routed twice.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from lragent.errors import Miss
from lragent.graph.fx_tools import add_constant, add_shared_constant, calls, fetch, only_user, placeholder
from lragent.passes.adapters.agent_rows import replace_rows
from lragent.passes.adapters.stack import gains, low_rank_stream, stack
from lragent.passes.contract import ROUTED, Pass, PassReport, RewriteContext, RoutedLinear
from lragent.passes.select_logits import ROWS
from lragent.program.cache_schema import LowRankStream

aten = torch.ops.aten
AGENT_IDS = "agent_ids"
# Constants that say whose columns are where; passes that lower for a target may write them into the code.
COLUMNS, ROUTE = "lora_columns", "lora_route"


@dataclass(frozen=True)
class _Chain:
    """One captured chain: `total = before + scaling * linear(linear(x, A), B)`.

    `width`: outputs of the module; of an embedding (`embeds`), its tokens.
    """

    module: str
    down: fx.Node
    before: fx.Node
    total: fx.Node
    embeds: bool
    width: int

    @property
    def x(self) -> fx.Node:
        """Input of the module as it is by now: it may be the output of one that was routed before."""
        x = self.down.args[1 if self.embeds else 0]
        assert isinstance(x, fx.Node)
        return x


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    chains: dict[tuple[str, fx.Node], list[_Chain]] = defaultdict(list)
    roots: dict[fx.Node, fx.Node] = {}
    misses: list[Miss] = []
    for down in calls(graph, aten.linear.default, aten.embedding.default):
        lora_side = _weight_lora_side(down, context)
        if lora_side is None or lora_side[1] != "a":
            continue
        found = _match(graph, down, lora_side[0], context)
        if isinstance(found, Miss):
            misses.append(found)
        else:
            # Chains of one projection follow each other; a projection called twice has two bases.
            root = roots.get(found.before, found.before)
            roots[found.total] = root
            chains[found.module, root].append(found)
    if not chains:
        return PassReport(0, tuple(misses))
    agent_ids = placeholder(graph, AGENT_IDS)
    if agent_ids is None:
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        with graph.graph.inserting_after(inputs[-1]):
            agent_ids = graph.graph.placeholder(AGENT_IDS)
    for index, group in enumerate(chains.values()):
        _rewrite(graph, context, index, group, agent_ids)
    graph.graph.eliminate_dead_code()
    return PassReport(len(chains), (*misses, *_left_over(graph, context, {miss.where for miss in misses})))


def _left_over(graph: fx.GraphModule, context: RewriteContext, missed: set[str]) -> list[Miss]:
    """Adapter weights that are still read, for modules not in `missed`: nobody's, whoever acts."""
    left: dict[str, Miss] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        module, _ = context.lora_side(node) or ("", "")
        if module and module not in missed and node.users:
            left.setdefault(module, Miss(module, node.name, "its adapter's weights are read by another op than linear"))
    return list(left.values())


def _weight_lora_side(node: fx.Node, context: RewriteContext) -> tuple[str, str] | None:
    """Projection and side of the captured adapter weight that a linear or embedding op reads, if it reads one."""
    return context.lora_side(node.args[0 if node.target is aten.embedding.default else 1])


def _match(graph: fx.GraphModule, down: fx.Node, module: str, context: RewriteContext) -> _Chain | Miss:
    def miss(node: fx.Node, reason: str) -> Miss:
        return Miss(module, node.name, reason)

    embeds = down.target is aten.embedding.default
    if not embeds and len(down.args) > 2 and down.args[2] is not None:
        return miss(down, "lora_A has a bias")
    up = only_user(down)
    if up is None or up.target is not aten.linear.default or _weight_lora_side(up, context) != (module, "b"):
        return miss(up or down, "the output of lora_A does not go into lora_B alone")
    if len(up.args) > 2 and up.args[2] is not None:
        return miss(up, "lora_B has a bias")
    scaled = only_user(up)
    if scaled is None or scaled.target is not aten.mul.Tensor or not isinstance(scaled.args[1], (int, float)):
        return miss(scaled or up, "the output of lora_B is not multiplied by a constant")
    if float(scaled.args[1]) not in context.captured_scaling[module]:
        return miss(scaled, f"scaling {scaled.args[1]} is not the adapter's")
    total = only_user(scaled)
    if total is None or total.target is not aten.add.Tensor or total.kwargs:
        return miss(total or scaled, "the adapter's output is not added to the projection")
    others = [a for a in total.args if a is not scaled]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return miss(total, "the adapter's output is not added to the projection")
    if not _rows_are_tokens(total):
        return miss(total, "its rows are not the tokens in their order, so they can't be routed by agent")
    sized = down.args[0] if embeds else up.args[1]
    assert isinstance(sized, fx.Node)
    return _Chain(module, down, others[0], total, embeds, fetch(graph, sized).shape[0])


def _rows_are_tokens(node: fx.Node) -> bool:
    """Whether a value is `[1, ..., 1, T, C]`."""
    ids = next((n for n in node.graph.find_nodes(op="placeholder") if n.target == "input_ids"), None)
    value = node.meta.get("val")
    if ids is None or value is None:
        return True
    *ones, rows, _ = value.shape
    return str(rows) == str(ids.meta["val"].shape[1]) and all(str(size) == "1" for size in ones)


def _rewrite(
    graph: fx.GraphModule, context: RewriteContext, index: int, group: list[_Chain], agent_ids: fx.Node
) -> None:
    totals = {chain.total for chain in group}
    base = next(chain.before for chain in group if chain.before not in totals)
    last = next(chain.total for chain in group if not any(user in totals for user in chain.total.users))
    module, x = group[0].module, group[0].x
    adapters, rows = context.adapters.get(module, {}), context.rows.get(module, {})
    stream = low_rank_stream(module, context.agents, adapters, context.groups.get(module))
    gain_NC = gains(context.agents, adapters)
    low_rank, total = None, base
    with graph.graph.inserting_before(last):
        ids = _ids_of_rows(graph, x, agent_ids)
        if gain_NC is not None:
            gain = graph.graph.call_function(
                aten.index_select.default, (add_constant(graph, f"lora_gain_{index}", gain_NC), 0, ids)
            )
            total = graph.graph.call_function(aten.mul.Tensor, (base, gain))
        if adapters:
            low_rank, delta = _low_rank(graph, context, index, group[0], stream, ids)
            total = graph.graph.call_function(aten.add.Tensor, (total, delta))
        if rows:
            chain = group[0]
            total = replace_rows(
                graph, f"lora_rows_{index}", context.agents, rows, x, total, ids, chain.width, chain.embeds
            )
    total.meta["val"] = last.meta.get("val")
    total.meta[ROUTED] = RoutedLinear(module, base, low_rank, stream, gain_NC, bool(rows))
    last.replace_all_uses_with(total)


def _low_rank(
    graph: fx.GraphModule, context: RewriteContext, index: int, chain: _Chain, stream: LowRankStream, ids: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Nodes of `x @ A_cat.T` and of the delta, at the insertion point."""
    a_cat, b_cat, columns, route, ones = stack(stream, context.agents, context.adapters[chain.module])
    a_node = add_constant(graph, f"lora_a_{index}", a_cat.T if chain.embeds else a_cat)
    ones_node = None if ones is None else add_constant(graph, f"lora_ones_{index}", ones)
    if chain.embeds:
        low_rank = graph.graph.call_function(aten.embedding.default, (a_node, chain.x))
        if ones_node is not None:
            low_rank = graph.graph.call_function(aten.add.Tensor, (low_rank, ones_node))
    else:
        bias = () if ones_node is None else (ones_node,)
        low_rank = graph.graph.call_function(aten.linear.default, (chain.x, a_node, *bias))
    own = low_rank
    if not torch.equal(columns, torch.arange(a_cat.shape[0])):
        columns_node = add_shared_constant(graph, COLUMNS, columns)
        own = graph.graph.call_function(
            aten.index_select.default, (low_rank, chain.down.meta["val"].dim() - 1, columns_node)
        )
    route_node = add_shared_constant(graph, ROUTE, route)
    mask = graph.graph.call_function(aten.index_select.default, (route_node, 0, ids))
    own = graph.graph.call_function(aten.mul.Tensor, (own, mask))
    b_node = add_constant(graph, f"lora_b_{index}", b_cat)
    return low_rank, graph.graph.call_function(aten.matmul.default, (own, b_node))


def _ids_of_rows(graph: fx.GraphModule, x: fx.Node, agent_ids: fx.Node) -> fx.Node:
    """Agent ids of the tokens in x: of those whose logits are wanted, if x was cut down to them."""
    rows = placeholder(graph, ROWS)
    if rows is not None and x.target is aten.index_select.default and x.args[2] is rows:
        return graph.graph.call_function(aten.index_select.default, (agent_ids, 0, rows))
    return agent_ids


ROUTE_ADAPTERS = Pass(
    "route_adapters", _run, required=True, hint="Leave these modules out of the adapters' target_modules."
)
