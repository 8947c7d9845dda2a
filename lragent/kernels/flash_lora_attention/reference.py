"""Definition of attention over split streams in plain PyTorch: slow and clear; it also runs in float64.

Legend: T = packed query tokens, S = sequences, M = pages per sequence, P = tokens per page, L = context length of a
sequence, n = queries of one agent in a sequence, Hq = query heads, H = KV heads (query head h reads KV head `h // (Hq
// H)`), Dk / Dv = head dims, r = rank.

float32 and float64 queries are computed in their own dtype, bfloat16 and float16 queries in float32. Only the result is
rounded to the query's dtype. Only the first `context_len` tokens of a sequence are read.

Source: Flash-LoRA-Attention, arXiv 2602.01053; sinks as in transformers' gpt_oss, softcap as in its gemma2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lragent.kernels.attention_call import AttentionCall
from lragent.program.cache_schema import LR_OFFSET, LR_RANK


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which attention is computed for a query of `dtype`."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def probabilities(
    query_nHqD: Tensor,
    key_LHD: Tensor,
    positions_n: Tensor,
    sinks_Hq: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Softmax weights `[Hq, n, L]`: scale, softcap, causal and window mask, sinks, in this order.

    Args:
        positions_n: index of each query in its sequence; see `visible`.
    """
    gqa_group = query_nHqD.shape[1] // key_LHD.shape[1]
    key_LHqD = key_LHD.repeat_interleave(gqa_group, dim=1)
    scores = torch.einsum("nhd,lhd->hnl", query_nHqD, key_LHqD) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(positions_n, key_LHD.shape[0], window), float("-inf"))
    if sinks_Hq is None:
        return torch.softmax(scores, dim=-1)
    sinks = sinks_Hq.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def visible(positions_n: Tensor, length: int, window: int) -> Tensor:
    """Keys that each query sees: bool `[n, length]`; key j is visible if `position - window < j <= position`."""
    j_L = torch.arange(length, device=positions_n.device)
    visible_nL = j_L <= positions_n[:, None]
    if window > 0:
        visible_nL &= j_L > positions_n[:, None] - window
    return visible_nL


def weighted_values(weights_HqnL: Tensor, value_LHD: Tensor) -> Tensor:
    """Weighted sum of values per query head: `[n, Hq, D]`."""
    gqa_group = weights_HqnL.shape[0] // value_LHD.shape[1]
    return torch.einsum("hnl,lhd->nhd", weights_HqnL, value_LHD.repeat_interleave(gqa_group, dim=1))


def causal_attention(
    query_1HqTDk: Tensor,
    key_1HTDk: Tensor,
    value_1HTDv: Tensor,
    sinks_Hq: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal attention of one sequence in transformers' layout: `[1, T, Hq, Dv]` in the query's dtype."""
    dtype = compute_dtype(query_1HqTDk.dtype)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query_1HqTDk, key_1HTDk, value_1HTDv))
    positions = torch.arange(query.shape[0], device=query.device)
    weights = probabilities(query, key, positions, sinks_Hq, scale, window, softcap)
    return weighted_values(weights, value)[None].to(query_1HqTDk.dtype)


def rms_norm(x_HD: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm per head for a weight `[D]`, over all heads together for a weight `[H, D]`."""
    over = (-2, -1) if weight.dim() == 2 else (-1,)
    return x_HD * torch.rsqrt(x_HD.square().mean(dim=over, keepdim=True) + eps) * weight


def rotate(key_LHD: Tensor, cos_LD: Tensor, sin_LD: Tensor, partner_D: Tensor) -> Tensor:
    """Rotates key j: `cos[j, d] * x[d] + sin[j, d] * x[partner[d]]`."""
    return cos_LD[:, None] * key_LHD + sin_LD[:, None] * key_LHD[..., partner_D]


def transform_key(
    key_LHD: Tensor, norm_weight: Tensor | None, norm_eps: float, rope: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """The key transform f of tokens 0 to L - 1 of a sequence; arguments as in `AttentionCall`."""
    if norm_weight is not None:
        key_LHD = rms_norm(key_LHD, norm_weight.to(key_LHD.dtype), norm_eps)
    if rope is not None:
        cos, sin, partner_D = rope
        length = key_LHD.shape[0]
        key_LHD = rotate(key_LHD, cos[:length].to(key_LHD.dtype), sin[:length].to(key_LHD.dtype), partner_D)
    return key_LHD


def lr_of_agent(lr: Tensor, entry: list[int], slots_L: Tensor) -> Tensor:
    """The LR stream `[L, rank]` of one agent at given slots of flat `lr`; `entry`: its row of the LR directory."""
    r = torch.arange(entry[LR_RANK], device=lr.device)
    return lr[entry[LR_OFFSET] + slots_L[:, None] * entry[LR_RANK] + r]


def flash_lora_attention(call: AttentionCall) -> Tensor:
    """`lragent::flash_lora_attention`: `[T, Hq, Dv]`; see `AttentionCall` for arguments and semantics."""
    query_THqDk, k_cache, v_cache = call.query_THqDk, call.k_cache, call.v_cache
    dtype = compute_dtype(query_THqDk.dtype)
    page_size = k_cache.shape[2]
    out = query_THqDk.new_zeros(query_THqDk.shape[0], query_THqDk.shape[1], v_cache.shape[3])

    def transform(key_LHD: Tensor) -> Tensor:
        return transform_key(key_LHD, call.norm_weight, call.norm_eps, call.rope)

    for s in range(call.context_lens_S.shape[0]):
        start, end, length = int(call.seq_starts[s]), int(call.seq_starts[s + 1]), int(call.context_lens_S[s])
        index_L = torch.arange(length, device=query_THqDk.device)
        pages_L, offsets_L = call.page_table_SM[s, index_L // page_size], index_L % page_size
        slots_L = pages_L * page_size + offsets_L
        base_k_LHD = k_cache[pages_L, :, offsets_L].to(dtype)
        base_v_LHD = v_cache[pages_L, :, offsets_L].to(dtype)
        agents_n = call.agent_ids_T[start:end]
        for agent in agents_n.unique().tolist():
            rows_n = start + (agents_n == agent).nonzero()[:, 0]
            key_LHD = base_k_LHD
            if call.k_low_rank is not None:
                lr, directory, lora_b = call.k_low_rank
                lr_k_Lr = lr_of_agent(lr, directory[agent].tolist(), slots_L).to(dtype)
                delta_LHD = torch.einsum("lr,hrd->lhd", lr_k_Lr, lora_b[agent, :, : lr_k_Lr.shape[1]].to(dtype))
                key_LHD = key_LHD + (transform(delta_LHD) if call.key_is_final else delta_LHD)
            if not call.key_is_final:
                key_LHD = transform(key_LHD)
            query_nHqD, positions_n = query_THqDk[rows_n].to(dtype), length - end + rows_n
            weights = probabilities(
                query_nHqD, key_LHD, positions_n, call.sinks_Hq, call.scale, call.window, call.softcap
            )
            result = weighted_values(weights, base_v_LHD)
            if call.v_low_rank is not None:
                lr, directory, lora_b = call.v_low_rank
                lr_v_Lr = lr_of_agent(lr, directory[agent].tolist(), slots_L).to(dtype)
                gqa_group = result.shape[1] // v_cache.shape[1]
                lora_b_HqrD = lora_b[agent, :, : lr_v_Lr.shape[1]].to(dtype).repeat_interleave(gqa_group, dim=0)
                result = result + torch.einsum("hnr,hrd->nhd", weights @ lr_v_Lr, lora_b_HqrD)
            out[rows_n] = result.to(out.dtype)
    return out
