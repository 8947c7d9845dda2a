"""Splits rows into adapter-free ones, through which no gradient goes, and the others.

Under `neutral_shared` and `rebase_shared` most rows are adapter-free and read adapter-free rows alone. Nothing that is
trained acts on them; of their streams only `x A` depends on a parameter. So they run first, without a backward pass but
that of `x A`, and the other rows read their streams.

Legend: N = rows, L = positions of a read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lragent.training.rows import Parts, Read, Rows


def parts_of(rows: Rows) -> Parts | None:
    """Splits off the adapter-free rows; None if there are none, or if gradients could go through them."""
    is_free_N = rows.agent_ids_N == 0
    reads_of_free = [read for read in rows.reads if read.agent == 0]
    if (
        rows.whole
        or not reads_of_free
        or bool(is_free_N[rows.logits_rows_R].any())
        or not all(bool(is_free_N[read.base_L].all() & is_free_N[read.low_rank_L].all()) for read in reads_of_free)
    ):
        return None
    free, others = is_free_N.nonzero()[:, 0], (~is_free_N).nonzero()[:, 0]
    place_N = torch.empty_like(rows.token_ids_N)  # of each row in its part
    place_N[free] = torch.arange(len(free), device=free.device)
    place_N[others] = torch.arange(len(others), device=free.device)
    in_both_N = torch.where(is_free_N, place_N, place_N + len(free))
    wanted = replace(rows, logits_rows_R=place_N[rows.logits_rows_R])
    nothing = rows.logits_rows_R[:0]
    unwanted = replace(rows, logits_rows_R=nothing, targets_R=nothing, target_agents_R=nothing, turns_R=nothing)
    reads_of_others = [read for read in rows.reads if read.agent != 0]
    return Parts(
        _part(unwanted, free, place_N, in_both_N, reads_of_free),
        _part(wanted, others, place_N, in_both_N, reads_of_others),
    )


def _part(rows: Rows, chosen: Tensor, place_N: Tensor, in_both_N: Tensor, reads: list[Read]) -> Rows:
    """Chosen rows and their reads, with the tokens that are wanted already."""
    return replace(
        rows,
        token_ids_N=rows.token_ids_N[chosen],
        positions_N=rows.positions_N[chosen],
        agent_ids_N=rows.agent_ids_N[chosen],
        reads=tuple(
            Read(read.agent, place_N[read.queries_n], in_both_N[read.base_L], in_both_N[read.low_rank_L])
            for read in reads
        ),
    )
