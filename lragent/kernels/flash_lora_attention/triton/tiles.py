"""Parts that the attention kernels share: slots of tokens, rebuilt keys, lora_b, softcap.

Legend: n = tokens of a tile, c = channels of a chunk, r = rank, padded to a power of two of at least 16,
G = query heads of a KV head, P = tokens per page, H = KV heads.

bfloat16 is upcast before all arithmetic except `tl.dot`. Operands of `tl.dot` have dtype `DOT`, its sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def token_slots(page_row, j_n, valid_n, P: tl.constexpr):
    """Page ids [n] and offsets in the page [n] of tokens `j_n` of a sequence; page 0 for invalid tokens."""
    page_n = tl.load(page_row + j_n // P, mask=valid_n, other=0)
    return page_n, j_n % P


@triton.jit
def load_lr(lr, offset, rank, slot_n, valid_n, R: tl.constexpr, DOT: tl.constexpr):
    """Loads an agent's LR stream at slots `slot_n`: [n, r], zero past its rank."""
    r_r = tl.arange(0, R)
    mask_nr = valid_n[:, None] & (r_r < rank)[None, :]
    return tl.load(lr + offset + slot_n[:, None] * rank + r_r[None, :], mask=mask_nr, other=0.0).to(DOT)


@triton.jit
def load_lora_b(b, channel_c, inside_c, RANK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr):
    """Loads channels `channel_c` of one head's lora_b `[RANK, D]`: [r, c]."""
    row_r = tl.arange(0, R)
    mask_rc = (row_r < RANK)[:, None] & inside_c[None, :]
    return tl.load(b + row_r[:, None] * D + channel_c[None, :], mask=mask_rc, other=0.0).to(DOT)


@triton.jit
def key_chunk(
    k_cache, row_n, j_n, valid_n, lr_nr, b_k, rope_cos, rope_sin, rope_partner, norm_weight,
    FIRST, C: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    FINAL: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Channels FIRST to FIRST + C of a tile of keys, [n, c], and the sum of their squares before the transform, [n].

    With NORM, the keys are not yet divided by their root mean square. The kernel applies that factor to the scores,
    once all channels are summed. The partner channels of `lr B` come from a second product with permuted channels of B.
    """
    channel_c = FIRST + tl.arange(0, C)
    inside_c = channel_c < D
    mask_nc = valid_n[:, None] & inside_c[None, :]
    key_nc = tl.load(k_cache + row_n[:, None] * D + channel_c[None, :], mask=mask_nc, other=0.0).to(tl.float32)
    squares_n = tl.zeros_like(j_n).to(tl.float32)
    if ROPE:
        table_nc = j_n[:, None] * D + channel_c[None, :]
        partner_c = tl.load(rope_partner + channel_c, mask=inside_c, other=0)
    if FINAL:
        if R > 0:
            lora_b_rc = load_lora_b(b_k, channel_c, inside_c, RANK, D, R, DOT)
            delta_nc = tl.dot(lr_nr, lora_b_rc, input_precision="ieee")
            if ROPE:
                lora_b_rc = load_lora_b(b_k, partner_c, inside_c, RANK, D, R, DOT)
                delta_nc *= tl.load(rope_cos + table_nc, mask=mask_nc, other=0.0).to(tl.float32)
                sin_nc = tl.load(rope_sin + table_nc, mask=mask_nc, other=0.0).to(tl.float32)
                delta_nc += sin_nc * tl.dot(lr_nr, lora_b_rc, input_precision="ieee")
            key_nc += delta_nc
    else:
        if R > 0:
            lora_b_rc = load_lora_b(b_k, channel_c, inside_c, RANK, D, R, DOT)
            key_nc = tl.dot(lr_nr, lora_b_rc, key_nc, input_precision="ieee")
        if NORM:
            squares_n = tl.sum(key_nc * key_nc, 1)
            key_nc *= tl.load(norm_weight + channel_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
        if ROPE:
            pair_nc = tl.load(k_cache + row_n[:, None] * D + partner_c[None, :], mask=mask_nc, other=0.0)
            pair_nc = pair_nc.to(tl.float32)
            if R > 0:
                lora_b_rc = load_lora_b(b_k, partner_c, inside_c, RANK, D, R, DOT)
                pair_nc = tl.dot(lr_nr, lora_b_rc, pair_nc, input_precision="ieee")
            if NORM:
                pair_nc *= tl.load(norm_weight + partner_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
            key_nc *= tl.load(rope_cos + table_nc, mask=mask_nc, other=0.0).to(tl.float32)
            key_nc += pair_nc * tl.load(rope_sin + table_nc, mask=mask_nc, other=0.0).to(tl.float32)
    return key_nc.to(DOT), squares_n


@triton.jit
def capped(score, SOFTCAP: tl.constexpr):
    """Scores after softcap, times log2(e), so that the softmax can use exp2; SOFTCAP 0: no softcap."""
    if SOFTCAP > 0:
        # tanh(x) = sign(x) (1 - 2 e / (1 + e)) with e = exp(-2 |x|): no overflow.
        e = tl.exp2(tl.abs(score) * (-2 * LOG2E / SOFTCAP))
        value = SOFTCAP * (1 - e) / (1 + e)
        score = tl.where(score < 0, -value, value)
    return score * LOG2E
