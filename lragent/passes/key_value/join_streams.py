"""Joins the LR streams of several projections that feed one K or V into one LR stream.

Before:                                          After:
    lr1 = linear(x1, A1_cat)    [1, T, R1]           both = cat([lr1, lr2], -1)            [1, T, R1 + R2]
    lr2 = linear(x2, A2_cat)    [1, T, R2]           lr   = index_select(both, 2, order)   [1, T, R]

The LR part of an agent is the concatenation over its projections. Agents share an LR block only if they share A in
every projection.
"""

from __future__ import annotations

import torch
from torch import fx

from lragent.graph.fx_tools import add_shared_constant, emit
from lragent.passes.contract import RoutedLinear
from lragent.passes.key_value.projection_path import ProjectionPath
from lragent.passes.route_adapters import GATHER_INDEX
from lragent.program.cache_schema import LowRankStream

aten = torch.ops.aten


def join_streams(graph: fx.GraphModule, path: ProjectionPath) -> RoutedLinear:
    """The joined LR stream of all adapted projections of a path; its `low_rank` node is `[1, T, R]`."""
    parts = [(r, source) for r, source in zip(path.routed, path.sources, strict=True) if r is not None]
    if len(parts) == 1 and parts[0][1].meta["val"].dim() == 3:
        return parts[0][0]
    streams = [routed.stream for routed, _ in parts]
    stream = join(streams)
    with graph.graph.inserting_before(path.end):
        flat = [_flat(graph, routed, source) for routed, source in parts]
        both = flat[0]
        if len(flat) > 1:
            both = emit(graph, aten.cat.default, flat, -1)
            order = add_shared_constant(graph, GATHER_INDEX, torch.tensor(source_order(streams, stream)))
            both = emit(graph, aten.index_select.default, both, 2, order)
    return RoutedLinear(stream.module, parts[0][0].base, both, stream)


def _flat(graph: fx.GraphModule, routed: RoutedLinear, source: fx.Node) -> fx.Node:
    assert routed.low_rank is not None
    if source.meta["val"].dim() == 3:
        return routed.low_rank
    return emit(graph, aten.reshape.default, routed.low_rank, [1, -1, routed.stream.width])


def join(streams: list[LowRankStream]) -> LowRankStream:
    """Adds up the ranks; agents share A if they share it in every stream in which they have a rank."""
    agents = range(len(streams[0].ranks))
    ranks = tuple(sum(s.ranks[a] for s in streams) for a in agents)
    same = [tuple((s.ranks[a], s.shares_a_with[a] if s.ranks[a] else -1) for s in streams) for a in agents]
    shares_a_with = tuple(next(b for b in agents if same[b] == same[a]) if ranks[a] else a for a in agents)
    return LowRankStream(" + ".join(s.module for s in streams), ranks, shares_a_with)


def source_order(streams: list[LowRankStream], joined: LowRankStream) -> list[int]:
    """For each number of the joined stream, its index in the concatenated streams."""
    order: list[int] = []
    for agent, rank in enumerate(joined.ranks):
        if rank == 0 or joined.shares_a_with[agent] != agent:
            continue
        start = 0
        for stream in streams:
            first = start + stream.source_columns()[agent] if stream.ranks[agent] else start
            order += range(first, first + stream.ranks[agent])
            start += stream.width
    return order
