"""Fuses projections of one input, with their routed adapters, into one op if the implementation has a kernel for it.

Before:                                              After:
    v   = linear(x, W_v)          [1, T, Nv]             y  = routed_linears(x, [W_v, A_v, W_q, B_v, A_q, B_q], ...)
    lr  = linear(x, A_v)          [1, T, R]              v2 = y[..., 0 : Nv]
    own = lr[..., columns] * route[agent_ids]            lr = y[..., Nv : Nv + R]     if the cache stores it too
    v2  = v + matmul(own, B_v)                           q2 = y[..., Nv + R : N]
    q2  = ... (likewise, with lr used here only)

The kernel multiplies each token by lora_b of its agent only. A down-projection is private if nothing else reads its LR
stream (A_q); a token is then multiplied by A of its agent only, so the cost does not grow with the number of agents. A
routed delta in another form than that of `route_adapters` is not fused, nor is a projection without a stored weight.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lragent.graph.fx_tools import calls, emit, fetch, only_user, placeholder
from lragent.graph.passes import Pass, PassReport
from lragent.kernels import ops
from lragent.kernels.implementations import IMPLEMENTATION_OF
from lragent.passes.contract import LowerContext

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Routes = list[int]


@dataclass(frozen=True)
class _Delta:
    """The delta of all adapters of a projection: `total = base + routed(low_rank) @ up`."""

    total: fx.Node
    low_rank: fx.Node
    up: fx.Node
    routes: Routes  # [agents + 1, 3]


def _run(graph: fx.GraphModule, context: LowerContext) -> PassReport:
    if not IMPLEMENTATION_OF[context.attention].fuses_linears:
        return PassReport(0)
    fusion_groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in calls(graph, aten.linear.default):
        if _is_projection(graph, node):
            fusion_groups[node.args[0]].append(node)  # type: ignore[index]
    agent_ids = placeholder(graph, "agent_ids")
    assert agent_ids is not None
    for members in fusion_groups.values():
        deltas = {n: delta for n in members if (delta := _delta(graph, n, members, agent_ids)) is not None}
        _fuse(graph, members, deltas, agent_ids)
    for node in calls(graph, aten.view.default):
        node.target = aten.reshape.default  # a slice of the fused output is not contiguous, so it can't be viewed
    graph.graph.eliminate_dead_code()
    return PassReport(sum(len(g) for g in fusion_groups.values()))


def _is_stored(graph: fx.GraphModule, node: object, dims: int) -> bool:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    tensor = fetch(graph, node)
    return tensor.dim() == dims and tensor.dtype in _DTYPES and tensor.is_contiguous() and tensor.numel() > 0


def _is_projection(graph: fx.GraphModule, node: fx.Node) -> bool:
    bias = node.args[2] if len(node.args) > 2 else None
    return _is_stored(graph, node.args[1], 2) and (bias is None or _is_stored(graph, bias, 1)) and not node.kwargs


def _delta(graph: fx.GraphModule, base: fx.Node, members: list[fx.Node], agent_ids: fx.Node) -> _Delta | None:
    """The routed delta of a projection; None if it is not in the form of `route_adapters` or has other users."""
    total = only_user(base)
    if total is None or total.target is not aten.add.Tensor or total.kwargs or total.args[0] is not base:
        return None
    up = total.args[1]
    if not isinstance(up, fx.Node) or up.target is not aten.matmul.default or only_user(up) is not total:
        return None
    routed, up_weight = up.args
    if not _is_stored(graph, up_weight, 2) or not isinstance(routed, fx.Node):
        return None
    if routed.target is not aten.mul.Tensor or only_user(routed) is not up:
        return None
    low_rank, mask = routed.args
    gather_index = None
    if isinstance(low_rank, fx.Node) and low_rank.target is aten.index_select.default:
        low_rank, dim, index = low_rank.args
        gather_index = (
            fetch(graph, index) if dim == 2 and isinstance(index, fx.Node) and index.op == "get_attr" else None
        )
        if gather_index is None:
            return None
    if low_rank not in members or not isinstance(low_rank, fx.Node) or not isinstance(mask, fx.Node):
        return None
    if mask.target is not aten.index_select.default or mask.args[1:] != (0, agent_ids):
        return None
    route = mask.args[0]
    if not isinstance(route, fx.Node) or route.op != "get_attr":
        return None
    routes = _routes(fetch(graph, route), gather_index)
    return None if routes is None else _Delta(total, low_rank, up_weight, routes)  # type: ignore[arg-type]


def _routes(route: Tensor, gather_index: Tensor | None) -> Routes | None:
    """Per agent id: first row of the down-projection, first row of the up-projection, rank; None if not contiguous."""
    table: Routes = []
    for row in route.float():
        taken = row.nonzero().flatten().tolist()
        if any(row[c] != 1 for c in taken):
            return None
        sources = taken if gather_index is None else gather_index[taken].tolist()
        for found in (taken, sources):
            if found != list(range(found[0], found[0] + len(found)) if found else ()):
                return None
        table += [sources[0], taken[0], len(taken)] if taken else [0, 0, 0]
    return table


def _is_private(down: fx.Node) -> bool:
    """True if only one delta uses a down-projection, so that it is computed for the agent of each token only."""
    return only_user(down) is not None and (len(down.args) < 3 or down.args[2] is None)


def _fuse(graph: fx.GraphModule, members: list[fx.Node], deltas: dict[fx.Node, _Delta], agent_ids: fx.Node) -> None:
    private_downs = {delta.low_rank for delta in deltas.values() if _is_private(delta.low_rank)}
    projections = [n for n in members if n not in private_downs]
    adapted = [n for n in projections if n in deltas]
    stored: list[object] = [n.args[1] for n in projections]

    def place(tensor: object) -> int:
        stored.append(tensor)
        return len(stored) - 1

    def down_place(down: fx.Node) -> int:
        return place(down.args[1]) if down in private_downs else projections.index(down)

    bias_of = [place(n.args[2]) if len(n.args) > 2 and n.args[2] is not None else -1 for n in projections]
    down_of = [down_place(deltas[n].low_rank) if n in deltas else -1 for n in projections]
    up_of = [place(deltas[n].up) if n in deltas else -1 for n in projections]
    routes = [number for n in adapted for number in deltas[n].routes]
    agents = len(deltas[adapted[0]].routes) // 3 - 1 if adapted else 0
    with graph.graph.inserting_before(members[0]):
        tensors = [graph.graph.get_attr(str(tensor.target)) for tensor in stored]  # type: ignore[attr-defined]
        fused = emit(
            graph,
            ops.routed_linears,
            projections[0].args[0],
            agent_ids,
            tensors,
            bias_of,
            up_of,
            down_of,
            [agents, *routes],
        )
        first = 0
        for node in projections:
            features = fetch(graph, node.args[1]).shape[0]  # type: ignore[arg-type]
            part = fused
            if len(projections) > 1:
                part = emit(graph, aten.slice.Tensor, fused, -1, first, first + features)
            first += features
            replaced = deltas[node].total if node in deltas else node
            part.meta = dict(replaced.meta)
            replaced.replace_all_uses_with(part)


FUSE_LINEARS = Pass("fuse_linears", _run)
