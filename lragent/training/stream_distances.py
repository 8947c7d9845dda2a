"""Two measures that explain drift: base streams across agents, and the low-rank part that a reader finds.

Some trajectories are run as a whole by each agent, and without adapter. For a writer i and a reader j, over all tokens
and layers, with C the base stream of K or V and D_i = C_i - C_base:

- rho = |D_i| / |D_j| and cos = cos(D_i, D_j). The stream of a forward without adapter is nearer to the reader's own
  than the writer's is if and only if rho >= 2 cos.
- |x_i A_j B_j - x_j A_j B_j| / |x_j A_j B_j|: what a reader of low-rank streams gets wrong (`base_lr_shared`).
- |x_i A_i B_i - x_j A_j B_j| / |x_j A_j B_j|: what a reader of whole K and V gets wrong (`full_shared`).

Legend: m = tokens of a sequence, H = KV heads, D = head dim. Norms are over tokens, layers, heads and channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from lragent.program.agent import BASE
from lragent.runtime.schemes import EXACT
from lragent.training.attention import LowRank
from lragent.training.lower_to_rows import LayerStreams
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence

SEQUENCES = 4  # of the given ones, the first
TOKENS = 1024  # of each, the first


@dataclass(frozen=True)
class StreamDistance:
    """Measures of a writer, a reader and a side, "K" or "V"; None where the reader's denominator is 0.

    Args:
        rho, cos: of the base streams.
        low_rank: relative error of `x_i A_j B_j`.
        whole: relative error of `x_i A_i B_i`.
    """

    writer: str
    reader: str
    side: str
    rho: float | None
    cos: float | None
    low_rank: float | None
    whole: float | None

    @property
    def neutral_is_nearer(self) -> bool | None:
        """True if the base stream of a forward without adapter is nearer to the reader's own than the writer's is."""
        return None if self.rho is None or self.cos is None else self.rho >= 2 * self.cos


@dataclass
class _Sums:
    """Squared norms and products of one writer, reader and side."""

    writer: float = 0.0  # |D_i|^2
    reader: float = 0.0  # |D_j|^2
    product: float = 0.0  # D_i . D_j
    own: float = 0.0  # |x_j A_j B_j|^2
    low_rank: float = 0.0
    whole: float = 0.0


@dataclass
class _Collector:
    """Adds up the streams of each layer. Rows are blocks of equal length: `base`, then each agent.

    Args:
        blocks: agents, `base` first.
    """

    blocks: tuple[str, ...]
    sums: dict[tuple[str, str, str], _Sums] = field(default_factory=dict)

    def take(self, streams: LayerStreams) -> None:
        for side, base_NHD, low_rank in (
            ("K", streams.key_NHDk, streams.low_rank_k),
            ("V", streams.value_NHDv, streams.low_rank_v),
        ):
            stream = base_NHD.double().flatten(1).chunk(len(self.blocks))
            rows = torch.arange(base_NHD.shape[0]).chunk(len(self.blocks))
            for i, j in permutations(range(1, len(self.blocks)), 2):
                key = (self.blocks[i], self.blocks[j], side)
                sums = self.sums.setdefault(key, _Sums())
                writer, reader = stream[i] - stream[0], stream[j] - stream[0]
                sums.writer += _squared(writer)
                sums.reader += _squared(reader)
                sums.product += float((writer * reader).sum())
                if low_rank is not None:
                    _add_low_rank(sums, low_rank, rows, i, j)


def _add_low_rank(sums: _Sums, low_rank: LowRank, rows: Sequence[Tensor], i: int, j: int) -> None:
    own, read, whole = (low_rank.delta(rows[x], agent) for x, agent in ((j, j), (i, j), (i, i)))
    if own is None or read is None:  # the reader has no adapter here
        return
    sums.own += _squared(own)
    sums.low_rank += _squared(read - own)
    sums.whole += _squared(own if whole is None else whole - own)


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())


def stream_distances(model: SharedModel, sequences: Sequence[TurnSequence]) -> tuple[StreamDistance, ...]:
    """Measures all pairs of agents on the first `SEQUENCES` sequences; empty with fewer than two agents.

    Memory holds the streams of one layer, of one sequence under all agents.
    """
    if len(model.agents) < 2:
        return ()
    collector = _Collector((BASE, *model.agents))
    with torch.no_grad():
        for sequence in sequences[:SEQUENCES]:
            ids = sequence.token_ids[: TOKENS + 1]
            if len(ids) > 1:
                last = len(ids) - 1  # a turn of one token, so that the agent processes all tokens before it
                runs = [TurnSequence(ids, (Turn(agent, last, last + 1),)) for agent in collector.blocks]
                model.hidden(rows_of(EXACT, runs, model.agents), collector.take)
    return tuple(_distance(*key, sums) for key, sums in collector.sums.items())


def _distance(writer: str, reader: str, side: str, sums: _Sums) -> StreamDistance:
    moved = sums.writer > 0 and sums.reader > 0
    return StreamDistance(
        writer=writer,
        reader=reader,
        side=side,
        rho=math.sqrt(sums.writer / sums.reader) if moved else None,
        cos=sums.product / math.sqrt(sums.writer * sums.reader) if moved else None,
        low_rank=math.sqrt(sums.low_rank / sums.own) if sums.own > 0 else None,
        whole=math.sqrt(sums.whole / sums.own) if sums.own > 0 else None,
    )
