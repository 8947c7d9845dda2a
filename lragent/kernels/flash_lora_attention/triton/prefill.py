"""Attention of sequences with several query tokens: a block of queries with all query heads of a KV head as rows.

Program = KV head x block of queries. A key tile is rebuilt once for all rows of an agent; the loop over the context
runs once per agent of the block. The first block of sequence s is `seq_starts[s] // BLOCK + s`. The host can therefore
bound the number of blocks from shapes alone.

Legend: as in `tiles.py`; m = rows (query, head of the GQA group), Dv = value head dim, D_V = Dv padded to a power of
two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lragent.kernels.flash_lora_attention.triton.tiles import (
    LOG2E,
    capped,
    key_chunk,
    load_lora_b,
    load_lr,
    token_slots,
)


@triton.jit
def sequence_of_block(seq_starts, block, sequences, BLOCK: tl.constexpr):
    """The last sequence whose first block is at most `block`."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(seq_starts + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    return low


# These arguments change from step to step and must not trigger a new compilation.
@triton.jit(do_not_specialize=["pages_per_seq", "sequences"])
def prefill_kernel(
    query, k_cache, v_cache, agent_ids, seq_starts, context_lens, page_table,
    lr_k, lr_k_table, b_k, lr_v, lr_v_table, b_v, rope_cos, rope_sin, rope_partner, norm_weight, sinks,
    out, norm_eps, scale, pages_per_seq, sequences,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    RANK_K: tl.constexpr, RANK_V: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    FINAL: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, UNROLL: tl.constexpr, D_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Writes rows `out [T, Hq, Dv]` of sequences with more than one query token."""
    BLOCK: tl.constexpr = M // GROUP
    heads: tl.constexpr = H * GROUP
    head, block = tl.program_id(0), tl.program_id(1)
    wide_head = head.to(tl.int64)
    s = sequence_of_block(seq_starts, block, sequences, BLOCK)
    first_row = tl.load(seq_starts + s)
    rows = (tl.load(seq_starts + s + 1) - first_row).to(tl.int32)
    first = (block - (first_row // BLOCK + s)).to(tl.int32) * BLOCK
    if (rows == 1) | (first >= rows):
        return
    length = tl.load(context_lens + s).to(tl.int32)
    m_m = tl.arange(0, M)
    q_m, head_m = first + m_m // GROUP, head * GROUP + m_m % GROUP
    is_row_m = (m_m < BLOCK * GROUP) & (q_m < rows)
    position_m = length - rows + q_m
    at_m = (first_row.to(tl.int32) + q_m) * heads + head_m
    agent_m = tl.load(agent_ids + first_row + q_m, mask=is_row_m, other=-1).to(tl.int32)
    v_d = tl.arange(0, D_V)
    is_value_d = v_d < DV
    page_row = page_table + s.to(tl.int64) * pages_per_seq

    # For an agent without a row in this block, the loop over the context is empty.
    first_agent = tl.min(tl.where(is_row_m, agent_m, tl.max(agent_m, 0)), 0)
    for agent in tl.range(first_agent, tl.max(agent_m, 0) + 1, disable_licm=True):
        acts_m = agent_m == agent
        b_head = b_k
        if R_K > 0:
            k_offset, k_rank = tl.load(lr_k_table + agent * 4), tl.load(lr_k_table + agent * 4 + 1)
            b_head = b_k + (agent * H + wide_head) * RANK_K * DK
        if R_V > 0:
            v_offset, v_rank = tl.load(lr_v_table + agent * 4), tl.load(lr_v_table + agent * 4 + 1)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(tl.min(tl.where(acts_m, position_m, length), 0) - WINDOW + 1, 0)
        high = tl.max(tl.where(acts_m, position_m + 1, 0), 0)
        top_m = tl.full([M], float("-inf"), tl.float32)
        sum_m = tl.zeros([M], tl.float32)
        if SINKS:
            top_m = tl.load(sinks + head_m, mask=is_row_m, other=0.0).to(tl.float32) * LOG2E
            sum_m += 1.0
        out_md = tl.zeros([M, D_V], tl.float32)
        low_rank_mr = tl.zeros([M, R_V if R_V > 0 else 16], tl.float32)
        for tile in tl.range(low // N, tl.cdiv(high, N), disable_licm=True):
            j_n = tile * N + tl.arange(0, N)
            valid_n = (j_n >= low) & (j_n < high)
            page_n, offset_n = token_slots(page_row, j_n, valid_n, P)
            row_n, slot_n = (page_n * H + head) * P + offset_n, page_n * P + offset_n
            lr_nr = None
            if R_K > 0:
                lr_nr = load_lr(lr_k, k_offset, k_rank, slot_n, valid_n, R_K, DOT)
            score_mn = tl.zeros([M, N], tl.float32)
            squares_n = tl.zeros([N], tl.float32)
            for channel in tl.range(0, DK, C, loop_unroll_factor=UNROLL, disable_licm=True):
                key_nc, chunk_n = key_chunk(
                    k_cache, row_n, j_n, valid_n, lr_nr, b_head, rope_cos, rope_sin, rope_partner, norm_weight,
                    channel, C, DK, RANK_K, R_K, FINAL, ROPE, NORM, DOT,
                )  # fmt: skip
                c_C = channel + tl.arange(0, C)
                mask_mc = is_row_m[:, None] & (c_C < DK)[None, :]
                at_mc = at_m[:, None].to(tl.int64) * DK + c_C[None, :]
                query_mc = tl.load(query + at_mc, mask=mask_mc, other=0.0).to(DOT)
                score_mn = tl.dot(query_mc, tl.trans(key_nc), score_mn, input_precision="ieee")
                squares_n += chunk_n
            if NORM:
                score_mn *= tl.rsqrt(squares_n / DK + norm_eps)[None, :]
            visible_mn = valid_n[None, :] & (j_n[None, :] <= position_m[:, None])
            if WINDOW > 0:
                visible_mn = visible_mn & (j_n[None, :] > position_m[:, None] - WINDOW)
            score_mn = tl.where(visible_mn, capped(score_mn * scale, SOFTCAP), float("-inf"))
            new_m = tl.maximum(top_m, tl.max(score_mn, 1))
            # A row may have no visible key in this tile and in all tiles before it.
            shift_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            keep_m = tl.exp2(top_m - shift_m)
            weight_mn = tl.exp2(score_mn - shift_m[:, None])
            top_m, sum_m = new_m, sum_m * keep_m + tl.sum(weight_mn, 1)
            mask_nd = valid_n[:, None] & is_value_d[None, :]
            value_nd = tl.load(v_cache + row_n[:, None] * DV + v_d[None, :], mask=mask_nd, other=0.0).to(DOT)
            weight_mn = weight_mn.to(DOT)
            out_md = tl.dot(weight_mn, value_nd, out_md * keep_m[:, None], input_precision="ieee")
            if R_V > 0:
                lr_nv = load_lr(lr_v, v_offset, v_rank, slot_n, valid_n, R_V, DOT)
                low_rank_mr = tl.dot(weight_mn, lr_nv, low_rank_mr * keep_m[:, None], input_precision="ieee")
        divisor_m = tl.where(acts_m, sum_m, 1.0)[:, None]
        out_md /= divisor_m
        if R_V > 0:
            b_value = b_v + (agent * H + wide_head) * RANK_V * DV
            lora_b_rd = load_lora_b(b_value, v_d, is_value_d, RANK_V, DV, R_V, DOT)
            out_md = tl.dot((low_rank_mr / divisor_m).to(DOT), lora_b_rd, out_md, input_precision="ieee")
        at_md = out + at_m[:, None].to(tl.int64) * DV + v_d[None, :]
        tl.store(at_md, out_md.to(out.dtype.element_ty), mask=acts_m[:, None] & is_value_d[None, :])
