"""Attention of sequences with one query token, each split over its context; `reduce.py` merges the splits.

Program = (KV head and a block of its query heads) x sequence x split. Every product has tokens as its M dimension and
query heads as its N dimension, so that few heads leave little of a tensor core tile unused.

Legend: as in `tiles.py`; S = sequences, Hq = query heads, Dv = value head dim, D_V = Dv padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lragent.kernels.flash_lora_attention.triton.tiles import capped, key_chunk, load_lr, token_slots


# These arguments change from step to step and must not trigger a new compilation.
@triton.jit(do_not_specialize=["pages_per_seq", "splits"])
def decode_kernel(
    query, k_cache, v_cache, agent_ids, seq_starts, context_lens, page_table,
    lr_k, lr_k_table, b_k, lr_v, lr_v_table, rope_cos, rope_sin, rope_partner, norm_weight,
    partial, lse, norm_eps, scale, pages_per_seq, splits,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    RANK_K: tl.constexpr, RANK_V: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    FINAL: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, UNROLL: tl.constexpr, G: tl.constexpr, D_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Writes `partial [S, splits, Hq, Dv + RANK_V]` (float32, normalized within the split) and base-2 `lse`."""
    blocks: tl.constexpr = (GROUP + G - 1) // G
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    s, split = tl.program_id(1), tl.program_id(2)
    first_row = tl.load(seq_starts + s)
    if tl.load(seq_starts + s + 1) - first_row != 1:
        return
    length = tl.load(context_lens + s).to(tl.int32)
    low = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    low_tile, tiles = low // N, tl.cdiv(length, N)
    share = tl.cdiv(tiles - low_tile, splits)
    start = low_tile + split * share
    stop = tl.minimum(start + share, tiles)

    agent = tl.load(agent_ids + first_row)
    g_G = block * G + tl.arange(0, G)
    is_head_G = g_G < GROUP
    query_G = query + (first_row * H * GROUP + head * GROUP + g_G) * DK
    v_d = tl.arange(0, D_V)
    b_head = b_k
    if R_K > 0:
        k_offset, k_rank = tl.load(lr_k_table + agent * 4), tl.load(lr_k_table + agent * 4 + 1)
        b_head = b_k + (agent * H + head) * RANK_K * DK
    if R_V > 0:
        v_offset, v_rank = tl.load(lr_v_table + agent * 4), tl.load(lr_v_table + agent * 4 + 1)

    top_G = tl.full([G], float("-inf"), tl.float32)
    sum_G = tl.zeros([G], tl.float32)
    out_dG = tl.zeros([D_V, G], tl.float32)
    low_rank_rG = tl.zeros([R_V if R_V > 0 else 16, G], tl.float32)
    for tile in tl.range(start, stop, disable_licm=True):
        j_n = tile * N + tl.arange(0, N)
        valid_n = (j_n >= low) & (j_n < length)
        page_n, offset_n = token_slots(page_table + s.to(tl.int64) * pages_per_seq, j_n, valid_n, P)
        row_n, slot_n = (page_n * H + head) * P + offset_n, page_n * P + offset_n
        lr_nr = None
        if R_K > 0:
            lr_nr = load_lr(lr_k, k_offset, k_rank, slot_n, valid_n, R_K, DOT)
        score_nG = tl.zeros([N, G], tl.float32)
        squares_n = tl.zeros([N], tl.float32)
        for first in tl.range(0, DK, C, loop_unroll_factor=UNROLL, disable_licm=True):
            key_nc, chunk_n = key_chunk(
                k_cache, row_n, j_n, valid_n, lr_nr, b_head, rope_cos, rope_sin, rope_partner, norm_weight,
                first, C, DK, RANK_K, R_K, FINAL, ROPE, NORM, DOT,
            )  # fmt: skip
            c_C = first + tl.arange(0, C)
            mask_cG = (c_C < DK)[:, None] & is_head_G[None, :]
            query_cG = tl.load(query_G[None, :] + c_C[:, None], mask=mask_cG, other=0.0).to(DOT)
            score_nG = tl.dot(key_nc, query_cG, score_nG, input_precision="ieee")
            squares_n += chunk_n
        if NORM:
            score_nG *= tl.rsqrt(squares_n / DK + norm_eps)[:, None]
        score_nG = tl.where(valid_n[:, None], capped(score_nG * scale, SOFTCAP), float("-inf"))
        new_G = tl.maximum(top_G, tl.max(score_nG, 0))
        keep_G = tl.exp2(top_G - new_G)
        weight_nG = tl.exp2(score_nG - new_G[None, :])
        top_G, sum_G = new_G, sum_G * keep_G + tl.sum(weight_nG, 0)
        value_mask = valid_n[:, None] & (v_d < DV)[None, :]
        value_nd = tl.load(v_cache + row_n[:, None] * DV + v_d[None, :], mask=value_mask, other=0.0).to(DOT)
        weight_nG = weight_nG.to(DOT)
        out_dG = tl.dot(tl.trans(value_nd), weight_nG, out_dG * keep_G[None, :], input_precision="ieee")
        if R_V > 0:
            lr_nv = load_lr(lr_v, v_offset, v_rank, slot_n, valid_n, R_V, DOT)
            low_rank_rG = tl.dot(tl.trans(lr_nv), weight_nG, low_rank_rG * keep_G[None, :], input_precision="ieee")

    at_G = (s.to(tl.int64) * splits + split) * H * GROUP + head * GROUP + g_G
    divisor_G = tl.where(sum_G > 0, sum_G, 1.0)
    tl.store(lse + at_G, tl.where(sum_G > 0, top_G + tl.log2(divisor_G), float("-inf")), mask=is_head_G)
    width: tl.constexpr = DV + RANK_V
    inside = (v_d < DV)[:, None] & is_head_G[None, :]
    tl.store(partial + at_G[None, :] * width + v_d[:, None], out_dG / divisor_G[None, :], mask=inside)
    if R_V > 0:
        r_r = tl.arange(0, R_V)
        inside = (r_r < RANK_V)[:, None] & is_head_G[None, :]
        tl.store(partial + at_G[None, :] * width + DV + r_r[:, None], low_rank_rG / divisor_G[None, :], mask=inside)
