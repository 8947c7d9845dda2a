"""Tensors of a routed projection: every agent's A, B and gain side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lragent.passes.contract import Adapter
from lragent.program.cache_schema import LowRankStream


def gains(agents: tuple[str, ...], adapters: Mapping[str, Adapter]) -> Tensor | None:
    """Stacks the gains of all agents: `[N + 1, out]` by agent id, row 0 ones; None if no adapter has a gain."""
    some = next((adapter.gain for adapter in adapters.values() if adapter.gain is not None), None)
    if some is None:
        return None
    table = some.new_ones(len(agents) + 1, some.shape[0])
    for row, name in enumerate(agents, 1):
        gain = adapters[name].gain if name in adapters else None
        if gain is not None:
            table[row] = gain
    return table


def low_rank_stream(
    module: str, agents: tuple[str, ...], adapters: Mapping[str, Adapter], group: tuple[int, ...]
) -> LowRankStream:
    """Describes the LR stream of a projection.

    Args:
        group: for each agent, index of the first agent with the same A (`loading.agent_slots.groups_of`).
    """
    ranks = tuple(adapters[name].a.shape[0] if name in adapters else 0 for name in agents)
    return LowRankStream(module, ranks, group)


def stack(
    stream: LowRankStream, agents: tuple[str, ...], adapters: Mapping[str, Adapter]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Stacks the adapters of all agents on a projection.

    Returns:
        A_cat `[R, in]`; B_cat `[sum of ranks, out]` with scaling and gain, each agent's rows side by side; the index
        `[sum of ranks]` (int64) of each row of B_cat into the LR stream; route `[N + 1, sum of ranks]`; and ones `[R]`
        (None if no adapter has a bias).
    """
    sources = stream.source_columns()
    distinct = [adapters[n] for i, n in enumerate(agents) if stream.ranks[i] and stream.shares_a_with[i] == i]
    own = [adapters[n] for i, n in enumerate(agents) if stream.ranks[i]]
    b_rows = [(adapter.b if adapter.gain is None else adapter.gain[:, None] * adapter.b).T for adapter in own]
    index = [c for i, rank in enumerate(stream.ranks) for c in range(sources[i], sources[i] + rank)]
    owners = torch.tensor([i + 1 for i, rank in enumerate(stream.ranks) for _ in range(rank)])
    route = (torch.arange(len(agents) + 1)[:, None] == owners[None, :]).to(b_rows[0].dtype)
    ones = None
    if any(adapter.ones is not None for adapter in distinct):
        ones = torch.cat([d.a.new_zeros(d.a.shape[0]) if d.ones is None else d.ones for d in distinct])
    return torch.cat([d.a for d in distinct], 0), torch.cat(b_rows, 0), torch.tensor(index), route, ones
