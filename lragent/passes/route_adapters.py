"""All agents' adapters on a projection become two GEMMs, chosen per token by `agent_ids`.

Before (one chain per captured adapter):         After:
    y  = linear(x, W)           [1, T, out]          y   = linear(x, W)                          [1, T, out]
    a  = linear(x, A)           [1, T, r]            lr  = linear(x, A_cat)                      [1, T, R]
    b  = linear(a, B)           [1, T, out]          own = index_select(lr, 2, columns) * route[agent_ids]
    s  = mul(b, scaling)                             d   = linear(own, B_cat)                    [1, T, out]
    y2 = add(y, s)                                   y2  = add(y, d)

R counts each distinct A once; `columns` gives every agent its own ranks again; `route` `[N + 1, sum of ranks]` is 1
where a column belongs to the agent (row 0 = base: all zero). Scaling is folded into B_cat. Chains are found by the
tensors they use, never by names; a projection called twice is routed twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lragent.kernels.cache_schema import LowRankStream
from lragent.passes.base import (
    ROUTED,
    Adapter,
    Miss,
    Pass,
    PassContext,
    PassReport,
    PassState,
    RoutedLinear,
    add_constant,
    add_shared_constant,
    calls,
    placeholder,
)

aten = torch.ops.aten
AGENT_IDS = "agent_ids"


@dataclass(frozen=True)
class _Chain:
    """One captured adapter: `total = before + scaling * linear(linear(x, A), B)`."""

    module: str
    x: fx.Node
    before: fx.Node
    total: fx.Node


def _run(graph: fx.GraphModule, context: PassContext, state: PassState) -> PassReport:
    chains: dict[tuple[str, fx.Node], list[_Chain]] = defaultdict(list)
    misses: list[Miss] = []
    for down in calls(graph, aten.linear.default):
        role = _lora_role(down, context)
        if role is None or role[1] != "a":
            continue
        found = _match(down, role[0], context)
        if isinstance(found, Miss):
            misses.append(found)
        else:
            chains[found.module, found.x].append(found)
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
    return PassReport(len(chains), tuple(misses))


def _lora_role(node: fx.Node, context: PassContext) -> tuple[str, str] | None:
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    # Names in the graph are those of the model, under the attribute of the exported wrapper.
    return context.lora_parameters.get(str(weight.target).partition(".")[2])


def _match(down: fx.Node, module: str, context: PassContext) -> _Chain | Miss:
    def miss(node: fx.Node, reason: str) -> Miss:
        return Miss(module, node.name, reason)

    x = down.args[0]
    assert isinstance(x, fx.Node)
    if len(down.args) > 2 and down.args[2] is not None:
        return miss(down, "lora_A has a bias")
    up = _only_user(down)
    if up is None or up.target is not aten.linear.default or _lora_role(up, context) != (module, "b"):
        return miss(up or down, "the output of lora_A does not go into lora_B alone")
    if len(up.args) > 2 and up.args[2] is not None:
        return miss(up, "lora_B has a bias")
    scaled = _only_user(up)
    if scaled is None or scaled.target is not aten.mul.Tensor or not isinstance(scaled.args[1], (int, float)):
        return miss(scaled or up, "the output of lora_B is not multiplied by a constant")
    if float(scaled.args[1]) not in context.captured_scaling[module]:
        return miss(scaled, f"scaling {scaled.args[1]} is not the adapter's")
    total = _only_user(scaled)
    if total is None or total.target is not aten.add.Tensor or total.kwargs:
        return miss(total or scaled, "the adapter's output is not added to the projection")
    others = [a for a in total.args if a is not scaled]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return miss(total, "the adapter's output is not added to the projection")
    return _Chain(module, x, others[0], total)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _rewrite(graph: fx.GraphModule, context: PassContext, index: int, group: list[_Chain], agent_ids: fx.Node) -> None:
    totals = {chain.total for chain in group}
    base = next(chain.before for chain in group if chain.before not in totals)
    last = next(chain.total for chain in group if not any(user in totals for user in chain.total.users))
    adapters = context.adapters[group[0].module]
    stream = low_rank_stream(group[0].module, context.agents, adapters)
    a_cat, b_cat, columns, route = stack(stream, context.agents, adapters)
    with graph.graph.inserting_before(last):
        a_node = add_constant(graph, f"lora_a_{index}", a_cat)
        low_rank = graph.graph.call_function(aten.linear.default, (group[0].x, a_node))
        own = low_rank
        if not torch.equal(columns, torch.arange(a_cat.shape[0])):
            columns_node = add_shared_constant(graph, "lora_columns", columns)
            own = graph.graph.call_function(aten.index_select.default, (low_rank, 2, columns_node))
        route_node = add_shared_constant(graph, "lora_route", route)
        mask = graph.graph.call_function(aten.index_select.default, (route_node, 0, agent_ids))
        own = graph.graph.call_function(aten.mul.Tensor, (own, mask))
        b_node = add_constant(graph, f"lora_b_{index}", b_cat)
        delta = graph.graph.call_function(aten.linear.default, (own, b_node))
        total = graph.graph.call_function(aten.add.Tensor, (base, delta))
    total.meta["val"] = last.meta.get("val")
    total.meta[ROUTED] = RoutedLinear(group[0].module, base, low_rank, stream)
    last.replace_all_uses_with(total)


def low_rank_stream(module: str, agents: tuple[str, ...], adapters: Mapping[str, Adapter]) -> LowRankStream:
    """Ranks of a projection's adapters, and which agents share a bit-equal A."""
    ranks: list[int] = []
    group: list[int] = []
    for index, name in enumerate(agents):
        adapter = adapters.get(name)
        ranks.append(adapter.a.shape[0] if adapter else 0)
        same = (
            (
                other
                for other in range(index)
                if agents[other] in adapters and _equal(adapters[agents[other]].a, adapter.a)
            )
            if adapter
            else ()
        )
        group.append(next(iter(same), index))
    return LowRankStream(module, tuple(ranks), tuple(group))


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def stack(
    stream: LowRankStream, agents: tuple[str, ...], adapters: Mapping[str, Adapter]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a routed projection.

    Returns:
        A_cat `[R, in]`, B_cat `[out, sum of ranks]` with scaling, columns `[sum of ranks]` (int64), and route
        `[N + 1, sum of ranks]`.
    """
    sources = stream.source_columns()
    a_rows = [adapters[n].a for i, n in enumerate(agents) if stream.ranks[i] and stream.group[i] == i]
    b_columns = [adapters[n].b for i, n in enumerate(agents) if stream.ranks[i]]
    columns = [c for i, rank in enumerate(stream.ranks) for c in range(sources[i], sources[i] + rank)]
    owners = torch.tensor([i + 1 for i, rank in enumerate(stream.ranks) for _ in range(rank)])
    route = (torch.arange(len(agents) + 1)[:, None] == owners[None, :]).to(b_columns[0].dtype)
    return torch.cat(a_rows, 0), torch.cat(b_columns, 1), torch.tensor(columns), route


ROUTE_ADAPTERS = Pass("route_adapters", _run)
