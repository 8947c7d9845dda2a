"""Projections of one input, with their routed adapters, become one call where there is a kernel for it (cpp).

Before:                                              After:
    q   = linear(x, W_q)          [1, T, Nq]             y  = routed_linears(x, [W_q, A_q, W_k, B_q], ...)
    lr  = linear(x, A_q)          [1, T, R]              q2 = y[..., 0 : Nq]
    own = lr[..., columns] * route[agent_ids]            lr = y[..., Nq : Nq + R]
    q2  = q + linear(own, B_q)                           k  = y[..., Nq + R : N]
    k   = linear(x, W_k)

The kernel takes an agent's own columns only. A routed delta of another form than `route_adapters` gives it stays as it
is; so does a projection that isn't a linear of a stored matrix.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lragent.kernels import ops
from lragent.passes.base import Pass, PassContext, PassReport, PassState, calls, fetch, only_user, placeholder

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Routes = list[int]


@dataclass(frozen=True)
class _Delta:
    """What an adapter adds to a projection: `total = base + own columns of low_rank @ up.T`."""

    total: fx.Node
    low_rank: fx.Node
    up: fx.Node
    routes: Routes  # [agents + 1, 3]


def _run(graph: fx.GraphModule, context: PassContext, state: PassState) -> PassReport:
    if context.attention != "cpp":
        return PassReport(0)
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in calls(graph, aten.linear.default):
        if _is_projection(graph, node):
            groups[node.args[0]].append(node)  # type: ignore[index]
    agent_ids = placeholder(graph, "agent_ids")
    assert agent_ids is not None
    done: set[fx.Node] = set()
    for linears in groups.values():
        # Up-projections are linears too: of what belongs to their group's delta.
        members = [n for n in linears if n not in done]
        deltas = {n: delta for n in members if (delta := _delta(graph, n, members, agent_ids)) is not None}
        if members:
            done.update(d for delta in deltas.values() for d in delta.total.all_input_nodes)
            _fuse(graph, members, deltas, agent_ids)
    for node in calls(graph, aten.view.default):
        node.target = aten.reshape.default  # a part of a wider row can't always be viewed
    graph.graph.eliminate_dead_code()
    return PassReport(sum(len(g) for g in groups.values()))


def _is_stored(graph: fx.GraphModule, node: object, dims: int) -> bool:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    tensor = fetch(graph, node)
    return tensor.dim() == dims and tensor.dtype in _DTYPES and tensor.is_contiguous() and tensor.numel() > 0


def _is_projection(graph: fx.GraphModule, node: fx.Node) -> bool:
    bias = node.args[2] if len(node.args) > 2 else None
    return _is_stored(graph, node.args[1], 2) and (bias is None or _is_stored(graph, bias, 1)) and not node.kwargs


def _delta(graph: fx.GraphModule, base: fx.Node, members: list[fx.Node], agent_ids: fx.Node) -> _Delta | None:
    """The routed delta that is added to a projection and to nothing else, if it has the usual form."""
    total = only_user(base)
    if total is None or total.target is not aten.add.Tensor or total.kwargs or total.args[0] is not base:
        return None
    up = total.args[1]
    if not isinstance(up, fx.Node) or up.target is not aten.linear.default or only_user(up) is not total:
        return None
    own = up.args[0]
    if len(up.args) != 2 or not _is_stored(graph, up.args[1], 2) or not isinstance(own, fx.Node):
        return None
    if own.target is not aten.mul.Tensor or only_user(own) is not up:
        return None
    low_rank, mask = own.args
    columns = None
    if isinstance(low_rank, fx.Node) and low_rank.target is aten.index_select.default:
        low_rank, dim, index = low_rank.args
        columns = fetch(graph, index) if dim == 2 and isinstance(index, fx.Node) and index.op == "get_attr" else None
        if columns is None:
            return None
    if low_rank not in members or not isinstance(low_rank, fx.Node) or not isinstance(mask, fx.Node):
        return None
    if mask.target is not aten.index_select.default or mask.args[1:] != (0, agent_ids):
        return None
    route = mask.args[0]
    if not isinstance(route, fx.Node) or route.op != "get_attr":
        return None
    routes = _routes(fetch(graph, route), columns)
    return None if routes is None else _Delta(total, low_rank, up.args[1], routes)  # type: ignore[arg-type]


def _routes(route: Tensor, columns: Tensor | None) -> Routes | None:
    """For every agent id: first column taken, first column of the up-projection, rank; None if they don't follow."""
    table: Routes = []
    for row in route.float():
        taken = row.nonzero().flatten().tolist()
        if any(row[c] != 1 for c in taken):
            return None
        sources = taken if columns is None else columns[taken].tolist()
        for found in (taken, sources):
            if found != list(range(found[0], found[0] + len(found)) if found else ()):
                return None
        table += [sources[0], taken[0], len(taken)] if taken else [0, 0, 0]
    return table


def _fuse(graph: fx.GraphModule, members: list[fx.Node], deltas: dict[fx.Node, _Delta], agent_ids: fx.Node) -> None:
    def stored(node: object) -> fx.Node:
        assert isinstance(node, fx.Node)
        return graph.graph.get_attr(str(node.target))

    biased = [n for n in members if len(n.args) > 2 and n.args[2] is not None]
    adapted = [n for n in members if n in deltas]
    bias_place = {n: len(members) + i for i, n in enumerate(biased)}
    up_place = {n: len(members) + len(biased) + i for i, n in enumerate(adapted)}
    agents = len(deltas[adapted[0]].routes) // 3 - 1 if adapted else 0
    with graph.graph.inserting_before(members[0]):
        weights, biases = [stored(n.args[1]) for n in members], [stored(n.args[2]) for n in biased]
        ups = [stored(deltas[n].up) for n in adapted]
        fused = graph.graph.call_function(
            ops.routed_linears,
            (
                members[0].args[0],
                agent_ids,
                [*weights, *biases, *ups],
                [bias_place.get(n, -1) for n in members],
                [up_place.get(n, -1) for n in members],
                [members.index(deltas[n].low_rank) if n in deltas else -1 for n in members],
                [agents, *(number for n in adapted for number in deltas[n].routes)],
            ),
        )
        first = 0
        for node in members:
            features = fetch(graph, node.args[1]).shape[0]  # type: ignore[arg-type]
            part = fused
            if len(members) > 1:
                part = graph.graph.call_function(aten.slice.Tensor, (fused, -1, first, first + features))
            first += features
            replaced = deltas[node].total if node in deltas else node
            part.meta = dict(replaced.meta)
            replaced.replace_all_uses_with(part)


FUSE_LINEARS = Pass("fuse_linears", _run)
