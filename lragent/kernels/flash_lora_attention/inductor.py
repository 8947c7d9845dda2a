"""Attention over split streams in aten ops, which Inductor compiles together with the model.

There is one function per kind of step:
- `decode_aten`: every sequence has one query (T == S); sequences may have different agents;
- `prefill_aten`: one sequence (S == 1) with any number of queries, all of one agent.
Neither has data-dependent control flow, so both trace with dynamic T, S, M and page count. Pages are gathered into
`[S, L, H, D]`. Scores take `T * Hq * L` numbers, so a long context needs small prefill chunks.

Legend: T = packed query tokens, S = sequences, M = pages per sequence, P = tokens per page, L = M * P, n = queries of a
sequence, Hq = query heads, H = KV heads, G = Hq / H, Dk / Dv = head dims, r = largest rank of the projection.

Semantics: `lragent.kernels.attention_call.AttentionCall`; definition: `reference.py` beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lragent.compat.torch import require_in_graph
from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention.reference import compute_dtype
from lragent.program.cache_schema import LR_OFFSET, LR_RANK


def decode_aten(call: AttentionCall) -> Tensor:
    """Attention of sequences with one query each: `[T, Hq, Dv]`."""
    require_in_graph(call.query_THqDk.shape[0] == call.page_table_SM.shape[0])
    return _attention(call, call.query_THqDk[:, None], call.agent_ids_T, call.context_lens_S, call.page_table_SM)[:, 0]


def prefill_aten(call: AttentionCall) -> Tensor:
    """Attention of one sequence whose queries all belong to the agent of the first query: `[T, Hq, Dv]`."""
    return _attention(
        call, call.query_THqDk[None], call.agent_ids_T[:1], call.context_lens_S[:1], call.page_table_SM[:1]
    )[0]


def _attention(
    call: AttentionCall, query_SnHqDk: Tensor, agents_S: Tensor, context_lens_S: Tensor, page_table_SM: Tensor
) -> Tensor:
    """Attention with n queries and one agent per sequence: `[S, n, Hq, Dv]`."""
    dtype = compute_dtype(query_SnHqDk.dtype)
    seqs, rows, query_heads, _ = query_SnHqDk.shape
    heads, page_size = call.k_cache.shape[1], call.k_cache.shape[2]
    gqa_group = query_heads // heads
    index_L = torch.arange(page_table_SM.shape[1] * page_size, device=query_SnHqDk.device)
    known_SL = index_L < context_lens_S[:, None]
    slots_SL = (page_table_SM[:, :, None] * page_size + torch.arange(page_size, device=index_L.device)).flatten(1)

    def transform(key_SLHDk: Tensor) -> Tensor:
        if call.norm_weight is not None:
            mean = key_SLHDk.square().mean(-1, keepdim=True)
            key_SLHDk = key_SLHDk * torch.rsqrt(mean + call.norm_eps) * call.norm_weight.to(dtype)
        if call.rope is not None:
            cos, sin, partner = call.rope
            # A padded page table has more positions than cos and sin. Those keys are masked.
            at_L = index_L.clamp(max=cos.shape[0] - 1)
            cos_L1D, sin_L1D = cos[at_L, None].to(dtype), sin[at_L, None].to(dtype)
            key_SLHDk = key_SLHDk * cos_L1D + key_SLHDk[..., partner] * sin_L1D
        return key_SLHDk

    key_SLHDk = _gathered(call.k_cache, page_table_SM).to(dtype)
    if call.k_low_rank is not None:
        lr, directory, lora_b = call.k_low_rank
        lr_SLr = _lr_of_agents(lr, directory[agents_S], lora_b.shape[2], slots_SL, known_SL).to(dtype)
        lora_b_SrHD = lora_b[agents_S].to(dtype).transpose(1, 2)
        delta_SLHDk = (lr_SLr @ lora_b_SrHD.flatten(2)).unflatten(2, (heads, -1))
        key_SLHDk = key_SLHDk + (transform(delta_SLHDk) if call.key_is_final else delta_SLHDk)
    if not call.key_is_final:
        key_SLHDk = transform(key_SLHDk)

    query_SHGnDk = query_SnHqDk.to(dtype).unflatten(2, (heads, gqa_group)).permute(0, 2, 3, 1, 4) * call.scale
    scores_SHGnL = (query_SHGnDk.flatten(2, 3) @ key_SLHDk.permute(0, 2, 3, 1)).unflatten(2, (gqa_group, -1))
    if call.softcap > 0:
        scores_SHGnL = call.softcap * torch.tanh(scores_SHGnL / call.softcap)
    positions_Sn = context_lens_S[:, None] - rows + torch.arange(rows, device=index_L.device)
    visible_SnL = index_L <= positions_Sn[:, :, None]
    if call.window > 0:
        visible_SnL = visible_SnL & (index_L > positions_Sn[:, :, None] - call.window)
    scores_SHGnL = scores_SHGnL.masked_fill(~visible_SnL[:, None, None], float("-inf"))
    if call.sinks_Hq is None:
        weights_SHGnL = torch.softmax(scores_SHGnL, -1)
    else:
        sinks = call.sinks_Hq.to(dtype).view(heads, gqa_group, 1, 1).expand(seqs, -1, -1, rows, -1)
        weights_SHGnL = torch.softmax(torch.cat([scores_SHGnL, sinks], -1), -1)[..., :-1]

    weights_SHrowsL = weights_SHGnL.flatten(2, 3)
    # Slots past the context were never written and may hold NaN, and 0 * NaN is NaN.
    value_SLHDv = torch.where(known_SL[:, :, None, None], _gathered(call.v_cache, page_table_SM).to(dtype), 0.0)
    out_SHrowsDv = weights_SHrowsL @ value_SLHDv.transpose(1, 2)
    if call.v_low_rank is not None:
        lr, directory, lora_b = call.v_low_rank
        lr_SLr = _lr_of_agents(lr, directory[agents_S], lora_b.shape[2], slots_SL, known_SL).to(dtype)
        reduced_SHrowsr = (weights_SHrowsL.flatten(1, 2) @ lr_SLr).unflatten(1, (heads, -1))
        out_SHrowsDv = out_SHrowsDv + reduced_SHrowsr @ lora_b[agents_S].to(dtype)
    out: Tensor = out_SHrowsDv.unflatten(2, (gqa_group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out.to(query_SnHqDk.dtype).contiguous()


def _gathered(cache: Tensor, page_table_SM: Tensor) -> Tensor:
    """The pages of each sequence in order: `[S, L, H, D]`."""
    return cache[page_table_SM].transpose(2, 3).flatten(1, 2)


def _lr_of_agents(lr: Tensor, entries_S4: Tensor, width: int, slots_SL: Tensor, known_SL: Tensor) -> Tensor:
    """The LR stream of each sequence's agent, `[S, L, width]`; zero past its rank and past the context."""
    rank_S11, offset_S11 = entries_S4[:, LR_RANK, None, None], entries_S4[:, LR_OFFSET, None, None]
    r_r = torch.arange(width, device=lr.device)
    valid_SLr = known_SL[:, :, None] & (r_r < rank_S11)
    elements_SLr = torch.where(valid_SLr, offset_S11 + slots_SL[:, :, None] * rank_S11 + r_r, 0)
    return torch.where(valid_SLr, lr[elements_SLr], 0.0)
