"""Attention over split streams in plain PyTorch, for any device. Each page is gathered once per sequence and agent.

Decodes (sequences with one query token) of one agent run as a batch over pages. A prefill chunk (more query tokens)
runs alone, in blocks of query rows. The LR part of V is never expanded: `(p @ lr_v) @ lora_b_v`. The LR part of K is
expanded for the acting agent only.

Legend: T = packed query tokens, S = sequences, M = pages of the longest one, P = tokens per page, L = M * P, n = query
rows, Hq = query heads, H = KV heads, G = Hq / H, Dk / Dv = head dims, r = rank.

Semantics: `lragent.kernels.attention_call.AttentionCall`; definition: `reference.py` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention.reference import compute_dtype
from lragent.program.cache_schema import LR_OFFSET, LR_RANK

# Bytes of the scores of a block of prefill rows. They fit into a core's L2 cache; 64 MiB is two to three times slower.
SCORE_BYTES = 1 << 20
# A batch of decodes is padded to its longest member, which has at most `PADDING * shortest + PADDING_PAGES` pages.
PADDING = 1.25
PADDING_PAGES = 2


@dataclass(frozen=True)
class _LowRank:
    """The LR stream of K or V of one agent: its LR block `[pages, P, r]` and its lora_b `[H, r, D]`."""

    block: Tensor
    lora_b_HrD: Tensor

    def pages(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.block.index_select(0, index).to(dtype)


@dataclass(frozen=True)
class _Attention:
    """A call, its rotation, and the dtype of the computation."""

    call: AttentionCall
    rope: tuple[Tensor, Tensor, Tensor] | None
    dtype: torch.dtype

    def transform(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies the key transform f to `key [..., H, P, Dk]`; cos and sin are broadcast."""
        if self.call.norm_weight is not None:
            weight = self.call.norm_weight.to(key.dtype)
            over_all_heads = weight.dim() == 2
            mean = key.square().mean((-3, -1) if over_all_heads else -1, keepdim=True)
            key = key * torch.rsqrt(mean + self.call.norm_eps) * (weight[:, None] if over_all_heads else weight)
        if self.rope is not None:
            key = key * cos + key[..., self.rope[2]] * sin
        return key

    def lr_part(self, lr: Tensor, lora_b_HrD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The LR part of keys, `[..., H, P, Dk]`, from `lr [..., P, r]`; it is rotated if the base key is."""

        def expanded(lora_b_HrD: Tensor) -> Tensor:
            lora_b_rHD = lora_b_HrD.transpose(0, 1)
            delta: Tensor = (lr @ lora_b_rHD.flatten(1)).unflatten(-1, lora_b_rHD.shape[1:])
            return delta.transpose(-2, -3)

        if not self.call.key_is_final or self.rope is None:
            return expanded(lora_b_HrD)
        # (lr B)[partner] = lr (B[partner]): a second small product is cheaper than permuting the large result.
        return expanded(lora_b_HrD).mul_(cos).addcmul_(expanded(lora_b_HrD[..., self.rope[2]]), sin)

    def cos_sin(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0..length-1, `[length, Dk]`; zeros past the last known position (padding only)."""
        if self.rope is None:
            empty = self.call.k_cache.new_empty(0)
            return empty, empty
        cos, sin = (t[:length].to(self.dtype) for t in self.rope[:2])
        if cos.shape[0] < length:
            rest = (0, 0, 0, length - cos.shape[0])
            cos, sin = torch.nn.functional.pad(cos, rest), torch.nn.functional.pad(sin, rest)
        return cos, sin

    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """Softmax of scaled scores `[..., H, G, n, L]`; `hidden` is True where a key is not visible."""
        if self.call.softcap > 0:
            scores = torch.tanh(scores / self.call.softcap) * self.call.softcap
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.call.sinks_Hq is None:
            return torch.softmax(scores, -1)
        heads, gqa_group, rows = scores.shape[-4:-1]
        sinks = self.call.sinks_Hq.to(scores.dtype).view(heads, gqa_group, 1, 1).expand(*scores.shape[:-1], 1)
        assert sinks.shape[-2] == rows
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


def flash_lora_attention(call: AttentionCall) -> Tensor:
    """`lragent::flash_lora_attention_torch`: `[T, Hq, Dv]`."""
    dtype = compute_dtype(call.query_THqDk.dtype)
    attention = _Attention(call, call.rope, dtype)
    all_pages, _, page_size, _ = call.k_cache.shape
    starts, lengths, agents = (t.tolist() for t in (call.seq_starts, call.context_lens_S, call.agent_ids_T))
    directories = [side[1].tolist() if side is not None else [] for side in (call.k_low_rank, call.v_low_rank)]
    query = call.query_THqDk.to(dtype)
    out = query.new_empty(query.shape[0], query.shape[1], call.v_cache.shape[3])

    def low_rank(agent: int) -> tuple[_LowRank | None, _LowRank | None]:
        k_side = _low_rank(call.k_low_rank, directories[0], agent, all_pages, page_size, dtype)
        return k_side, _low_rank(call.v_low_rank, directories[1], agent, all_pages, page_size, dtype)

    decodes: dict[int, list[int]] = {}
    for s, length in enumerate(lengths):
        start, end = starts[s], starts[s + 1]
        if end - start == 1:
            decodes.setdefault(agents[start], []).append(s)
            continue
        pages = call.page_table_SM[s, : -(-length // page_size)]
        for first, last in _runs(agents, start, end):
            out[first:last] = _prefill(
                attention, query[first:last], pages, length - end + first, low_rank(agents[first])
            )
    for agent, members in decodes.items():
        for batch in _batches(members, [-(-lengths[s] // page_size) for s in members]):
            rows = torch.tensor([starts[s] for s in batch], device=query.device)
            chosen = torch.tensor(batch, device=query.device)
            most_pages = max(-(-lengths[s] // page_size) for s in batch)
            pages = call.page_table_SM.index_select(0, chosen)[:, :most_pages]
            context = call.context_lens_S.index_select(0, chosen)
            out[rows] = _decode(attention, query.index_select(0, rows), pages, context, low_rank(agent))
    return out.to(call.query_THqDk.dtype)


def _runs(agents: list[int], start: int, end: int) -> list[tuple[int, int]]:
    """Ranges of consecutive tokens of one agent."""
    cuts = [start, *(t for t in range(start + 1, end) if agents[t] != agents[t - 1]), end]
    return list(pairwise(cuts))


def _batches(members: list[int], pages: list[int]) -> list[list[int]]:
    """Groups members with similar page counts, so that there is little padding."""
    batches: list[list[int]] = []
    limit = 0.0
    for count, member in sorted(zip(pages, members, strict=True)):
        if not batches or count > limit:
            batches.append([])
            limit = count * PADDING + PADDING_PAGES
        batches[-1].append(member)
    return batches


def _low_rank(
    side: tuple[Tensor, Tensor, Tensor] | None,
    directory: list[list[int]],
    agent: int,
    pages: int,
    page_size: int,
    dtype: torch.dtype,
) -> _LowRank | None:
    """The LR stream of an agent; None if its rank is zero.

    Args:
        side: LR stream, LR directory and lora_b of K or V.
        directory: the LR directory as a list.
    """
    if side is None or directory[agent][LR_RANK] == 0:
        return None
    cache, _, lora_b_NHrD = side
    offset, rank = directory[agent][LR_OFFSET], directory[agent][LR_RANK]
    block = cache[offset : offset + pages * page_size * rank].view(pages, page_size, rank)
    return _LowRank(block, lora_b_NHrD[agent, :, :rank].to(dtype))


def _decode(
    attention: _Attention,
    query_SHqDk: Tensor,
    pages_SM: Tensor,
    context_S: Tensor,
    low_rank: tuple[_LowRank | None, _LowRank | None],
) -> Tensor:
    """Attention of one query per sequence, all of one agent: `[S, Hq, Dv]`. Padding pages are the scratch page."""
    call, (k_low, v_low) = attention.call, low_rank
    seqs, pages = pages_SM.shape
    _, heads, page_size, _ = call.k_cache.shape
    gqa_group = query_SHqDk.shape[1] // heads
    index = pages_SM.reshape(-1)
    tiles = (seqs, pages, heads, page_size)
    key = call.k_cache.index_select(0, index).to(attention.dtype).view(*tiles, -1)
    value = call.v_cache.index_select(0, index).to(attention.dtype).view(*tiles, -1)
    cos, sin = attention.cos_sin(pages * page_size) if k_low is not None or not call.key_is_final else (key, key)
    if attention.rope is not None and (k_low is not None or not call.key_is_final):
        cos, sin = cos.view(pages, 1, page_size, -1), sin.view(pages, 1, page_size, -1)
    if k_low is not None:
        lr_SMPr = k_low.pages(index, attention.dtype).view(seqs, pages, page_size, -1)
        key += attention.lr_part(lr_SMPr, k_low.lora_b_HrD, cos, sin)
    if not call.key_is_final:
        key = attention.transform(key, cos, sin)
    positions_L = torch.arange(pages * page_size, device=index.device)
    past_SL = positions_L >= context_S[:, None]
    hidden_SL = past_SL
    if call.window > 0:
        hidden_SL = past_SL | (positions_L < context_S[:, None] - call.window)
    grouped = query_SHqDk.view(seqs, 1, heads, gqa_group, -1) * call.scale
    scores_SMHGP = grouped @ key.transpose(-1, -2)
    scores_SHGL = scores_SMHGP.permute(0, 2, 3, 1, 4).reshape(seqs, heads, gqa_group, 1, -1)
    weights = attention.weights(scores_SHGL, hidden_SL[:, None, None, None])
    weights_SMHGP = weights.view(seqs, heads, gqa_group, pages, page_size).permute(0, 3, 1, 2, 4)
    past_SMP = past_SL.view(seqs, pages, page_size)
    # Slots past the context were never written for this sequence and may hold NaN, and 0 * NaN is NaN.
    value.transpose(2, 3)[past_SMP] = 0
    out = (weights_SMHGP @ value).sum(1)
    if v_low is not None:
        lr_SMPr = v_low.pages(index, attention.dtype).view(seqs, pages, page_size, -1)
        lr_SMPr[past_SMP] = 0
        reduced_SHGr = (weights_SMHGP @ lr_SMPr[:, :, None]).sum(1)
        out = out + reduced_SHGr @ v_low.lora_b_HrD
    return out.reshape(seqs, heads * gqa_group, -1)


def _prefill(
    attention: _Attention,
    query_nHqDk: Tensor,
    pages_M: Tensor,
    first_position: int,
    low_rank: tuple[_LowRank | None, _LowRank | None],
) -> Tensor:
    """Attention of consecutive query rows of one sequence and agent: `[n, Hq, Dv]`."""
    call, (k_low, v_low) = attention.call, low_rank
    rows = query_nHqDk.shape[0]
    heads = call.k_cache.shape[1]
    gqa_group = query_nHqDk.shape[1] // heads
    length = first_position + rows  # causal: these rows see no later keys
    key_HLD = _gathered(call.k_cache, pages_M, length).to(attention.dtype)
    value_HLD = _gathered(call.v_cache, pages_M, length).to(attention.dtype)
    cos, sin = attention.cos_sin(length)
    if k_low is not None:
        lr_Lr = k_low.pages(pages_M, attention.dtype).flatten(0, 1)[:length]
        key_HLD += attention.lr_part(lr_Lr, k_low.lora_b_HrD, cos, sin)
    if not call.key_is_final:
        key_HLD = attention.transform(key_HLD, cos, sin)
    lr_v_Lr = v_low.pages(pages_M, attention.dtype).flatten(0, 1)[:length] if v_low is not None else None
    positions_L = torch.arange(length, device=pages_M.device)
    grouped_HGnD = query_nHqDk.view(rows, heads, gqa_group, -1).permute(1, 2, 0, 3) * call.scale
    out = query_nHqDk.new_empty(rows, heads, gqa_group, value_HLD.shape[-1])
    block = max(1, SCORE_BYTES // (heads * gqa_group * length * key_HLD.element_size()))
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        low = max(0, first_position + start - call.window + 1) if call.window > 0 else 0
        high = first_position + stop
        at_n1 = positions_L[first_position + start : high, None]
        hidden_nL = positions_L[low:high] > at_n1
        if call.window > 0:
            hidden_nL = hidden_nL | (positions_L[low:high] <= at_n1 - call.window)
        queries = grouped_HGnD[:, :, start:stop].reshape(heads, gqa_group * (stop - start), -1)
        scores = queries @ key_HLD[:, low:high].transpose(-1, -2)
        weights = attention.weights(scores.view(heads, gqa_group, stop - start, -1), hidden_nL)
        flat = weights.view(heads, gqa_group * (stop - start), -1)
        result = flat @ value_HLD[:, low:high]
        if v_low is not None and lr_v_Lr is not None:
            result = result + (flat @ lr_v_Lr[low:high]) @ v_low.lora_b_HrD
        out[start:stop] = result.view(heads, gqa_group, stop - start, -1).permute(2, 0, 1, 3)
    return out.flatten(1, 2)


def _gathered(cache: Tensor, pages_M: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence: `[H, length, D]`."""
    tiles_MHPD = cache.index_select(0, pages_M)
    return tiles_MHPD.transpose(0, 1).flatten(1, 2)[:, :length]
