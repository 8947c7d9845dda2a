"""Cache writes as Triton kernels: one program per token and KV head, or per token and LR block.

Legend: H = KV heads, P = tokens per page, d = channels, r = numbers of the LR stream.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kv_kernel(
    key, value, k_cache, v_cache, slots, pages, key_row, key_head, value_row, value_head,
    H: tl.constexpr, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Copies one head of one token into `[pages, H, P, d]`; a slot outside the cache is skipped."""
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    d_d = tl.arange(0, D)
    inside = (slot >= 0) & (slot < pages * P)
    row = (slot // P * H + head) * P + slot % P
    mask_d = inside & (d_d < DK)
    key_d = tl.load(key + token * key_row + head * key_head + d_d, mask=mask_d, other=0.0)
    tl.store(k_cache + row * DK + d_d, key_d.to(tl.float32).to(k_cache.dtype.element_ty), mask=mask_d)
    mask_d = inside & (d_d < DV)
    value_d = tl.load(value + token * value_row + head * value_head + d_d, mask=mask_d, other=0.0)
    tl.store(v_cache + row * DV + d_d, value_d.to(tl.float32).to(v_cache.dtype.element_ty), mask=mask_d)


# This argument changes from step to step and must not trigger a new compilation.
@triton.jit(do_not_specialize=["tokens"])
def write_lr_kernel(
    lr, lr_cache, lr_table, slots, elements, tokens, lr_row, agents, ROWS: tl.constexpr, R: tl.constexpr
):
    """Copies the LR part of one agent and token into the agent's block; a slot outside the block is skipped."""
    agent, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = lr_table + (agent + 1) * 4
    offset, rank, source = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if tl.load(entry + 3) == 0:
        return
    # The block ends where the next block begins.
    a_a = tl.arange(0, ROWS)
    offset_a = tl.load(lr_table + a_a * 4, mask=a_a <= agents, other=0)
    writes_a = tl.load(lr_table + a_a * 4 + 3, mask=a_a <= agents, other=0) != 0
    end = tl.min(tl.where(writes_a & (offset_a > offset), offset_a, elements), 0)
    slot = tl.load(slots + agent * tokens + token)
    inside = (slot >= 0) & (offset + (slot + 1) * rank <= end)
    for first in range(0, rank, R):
        r_r = first + tl.arange(0, R)
        mask_r = inside & (r_r < rank)
        lr_r = tl.load(lr + token * lr_row + source + r_r, mask=mask_r, other=0.0).to(tl.float32)
        tl.store(lr_cache + offset + slot * rank + r_r, lr_r.to(lr_cache.dtype.element_ty), mask=mask_r)
