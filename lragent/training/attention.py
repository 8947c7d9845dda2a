"""Attention over rows, differentiable: the definition of `kernels/flash_lora_attention/reference.py` without pages.

Legend: N = rows, n = queries of a read, L = positions of a read, H = KV heads, Hq = query heads, Dk / Dv = head dims, r
= rank, R = width of an LR stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.kernels.attention_call import all_or_none
from lragent.kernels.flash_lora_attention.reference import (
    compute_dtype,
    probabilities,
    transform_key,
    visible,
    weighted_values,
)
from lragent.training.rows import Read, Rows


@dataclass(frozen=True)
class LowRank:
    """The LR stream of one side (K or V).

    Args:
        lr_NR: `x @ A_cat.T` of every row.
        b_NHrD: B per agent id and head, row 0 zero.
        ranks, columns: rank and first column of each agent in `lr_NR`; index = agent id - 1.
    """

    lr_NR: Tensor
    b_NHrD: Tensor
    ranks: Sequence[int]
    columns: Sequence[int]

    def delta(self, rows_L: Tensor, agent: int) -> Tensor | None:
        """`x A B` of given rows with one agent's A and B: `[L, H, D]`; None if the agent adapts nothing here."""
        rank = self.ranks[agent - 1] if agent else 0
        if rank == 0:
            return None
        first = self.columns[agent - 1]
        own_Lr = self.lr_NR[:, first : first + rank][rows_L]
        return torch.einsum("lr,hrd->lhd", own_Lr, self.b_NHrD[agent, :, :rank].to(own_Lr.dtype))


@dataclass(frozen=True)
class KeyRule:
    """The key transform and the rules of the softmax; see `lragent.kernels.attention_call.AttentionCall`."""

    rope_cos: Tensor | None
    rope_sin: Tensor | None
    rope_partner: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    key_is_final: bool
    sinks_Hq: Tensor | None
    scale: float
    window: int
    softcap: float

    def transform(self, key_LHD: Tensor) -> Tensor:
        """f of the keys at positions 0 to L - 1, computed in at least float32."""
        wide = key_LHD.to(compute_dtype(key_LHD.dtype))
        rope = all_or_none(self.rope_cos, self.rope_sin, self.rope_partner)
        return transform_key(wide, self.norm_weight, self.norm_eps, rope).to(key_LHD.dtype)


def rows_attention(
    query_NHqDk: Tensor,
    key_NHDk: Tensor,
    value_NHDv: Tensor,
    low_rank_k: LowRank | None,
    low_rank_v: LowRank | None,
    rule: KeyRule,
    rows: Rows,
) -> Tensor:
    """Attention of all rows: `[N, Hq, Dv]` in the query's dtype.

    Args:
        key_NHDk, value_NHDv: base streams of every row; K after f if `rule.key_is_final`.
    """
    key, value = (key_NHDk, low_rank_k), (value_NHDv, low_rank_v)
    outputs: list[Tensor] = []
    for read in rows.reads:
        key_LHD = _streams(key, read, rows, None if not rule.key_is_final else rule)
        if not rule.key_is_final:
            key_LHD = rule.transform(key_LHD)
        value_LHD = _streams(value, read, rows, None)
        outputs.append(_attend(query_NHqDk[read.queries_n], key_LHD, value_LHD, rows.positions_N[read.queries_n], rule))
    queries_N = torch.cat([read.queries_n for read in rows.reads])
    return torch.cat(outputs)[queries_N.argsort()]


def _streams(side: tuple[Tensor, LowRank | None], read: Read, rows: Rows, rule: KeyRule | None) -> Tensor:
    """Base plus low-rank part at every position of a read: `[L, H, D]`.

    Args:
        rule: transforms the low-rank part; None adds it as it is.
    """
    base_NHD, low_rank = side
    streams_LHD = base_NHD[read.base_L]
    if low_rank is None:
        return streams_LHD
    if not rows.whole:
        delta_LHD = low_rank.delta(read.low_rank_L, read.agent)
    else:
        delta_LHD = _deltas_of_writers(low_rank, read.base_L, rows.agent_ids_N[read.base_L], streams_LHD)
    if delta_LHD is None:
        return streams_LHD
    return streams_LHD + (delta_LHD if rule is None else rule.transform(delta_LHD))


def _deltas_of_writers(low_rank: LowRank, rows_L: Tensor, agents_L: Tensor, like_LHD: Tensor) -> Tensor | None:
    """`x A B` of each row with the A and B of its own agent."""
    delta_LHD: Tensor | None = None
    for agent in agents_L.unique().tolist():
        mine_m = (agents_L == agent).nonzero()[:, 0]
        part_mHD = low_rank.delta(rows_L[mine_m], agent)
        if part_mHD is not None:
            start = torch.zeros_like(like_LHD) if delta_LHD is None else delta_LHD
            delta_LHD = start.index_add(0, mine_m, part_mHD.to(like_LHD.dtype))
    return delta_LHD


def _attend(query_nHqD: Tensor, key_LHD: Tensor, value_LHD: Tensor, positions_n: Tensor, rule: KeyRule) -> Tensor:
    """Softmax attention in which a query at position p sees positions up to p: `[n, Hq, Dv]`."""
    if rule.sinks_Hq is not None or rule.softcap > 0:
        dtype = compute_dtype(query_nHqD.dtype)
        query, key, value = (x.to(dtype) for x in (query_nHqD, key_LHD, value_LHD))
        weights = probabilities(query, key, positions_n, rule.sinks_Hq, rule.scale, rule.window, rule.softcap)
        return weighted_values(weights, value).to(query_nHqD.dtype)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query_nHqD.transpose(0, 1)[None],
        key_LHD.transpose(0, 1)[None],
        value_LHD.transpose(0, 1)[None],
        attn_mask=visible(positions_n, key_LHD.shape[0], rule.window),
        scale=rule.scale,
        enable_gqa=query_nHqD.shape[1] != key_LHD.shape[1],
    )
    return attended[0].transpose(0, 1)
