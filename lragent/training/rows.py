"""Rows of a training forward: the tokens that run through the model, and for each the rows that it reads.

A row is one token of one trajectory as one agent processes it. The same token may have several rows. A `Read` stands
for a page table: it names, for each position, the row whose base K and V stand there, and the row whose low-rank
numbers do. Several agents' queries over equal rows are several reads.

Legend: N = rows, R = rows whose logits are wanted, L = positions of a read, n = queries of a read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """Queries of one agent that attend to the same rows.

    A query at position p reads positions 0 to p.

    Args:
        agent: id of the agent whose B applies.
        queries_n: rows whose queries these are, in order of position.
        base_L: the row whose base K and V stand at each position.
        low_rank_L: the row whose low-rank numbers stand at each position.
    """

    agent: int
    queries_n: Tensor
    base_L: Tensor
    low_rank_L: Tensor


@dataclass(frozen=True)
class Rows:
    """Packed rows of several trajectories under one sharing scheme. All tensors are int64.

    Args:
        token_ids_N, positions_N, agent_ids_N: of each row; agent id 0 is `base`.
        reads: every row is a query of exactly one read.
        whole: True if K and V contain the part of the adapter of the row that they come from, as in dense layout. False
            if the reading agent's B applies to the low-rank numbers.
        logits_rows_R: for each generated token, the row whose logits predict it, in the order of sequences and tokens.
        targets_R: the generated token ids.
        target_agents_R: id of the agent that generated each.
        turns_R: number of the turn of each, counted over all sequences.
        parts: the same rows, split (`adapter_free.py`); None where they can't be.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    agent_ids_N: Tensor
    reads: tuple[Read, ...]
    whole: bool
    logits_rows_R: Tensor
    targets_R: Tensor
    target_agents_R: Tensor
    turns_R: Tensor
    parts: Parts | None = None

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        reads = tuple(
            Read(read.agent, read.queries_n.to(device), read.base_L.to(device), read.low_rank_L.to(device))
            for read in self.reads
        )
        parts = None if self.parts is None else Parts(self.parts.free.to(device), self.parts.others.to(device))
        return replace(self, **moved, reads=reads, parts=parts)


@dataclass(frozen=True)
class Parts:
    """Rows in two parts.

    Args:
        free: adapter-free rows that read adapter-free rows alone; no logits are wanted.
        others: the other rows. `base_L` and `low_rank_L` of their reads count the free rows first, then these.
    """

    free: Rows
    others: Rows
