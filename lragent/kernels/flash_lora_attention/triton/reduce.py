"""Merges the splits of `decode.py` and multiplies the LR sum of V by lora_b, once per query head.

Program = query head x sequence. Legend: as in `decode.py`; R = RANK_V padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lragent.kernels.flash_lora_attention.triton.tiles import LOG2E


# This argument changes from step to step and must not trigger a new compilation.
@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    partial, lse, agent_ids, seq_starts, b_v, sinks, out, splits,
    H: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, RANK_V: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    """Writes rows `out [T, Hq, Dv]` of sequences with one query token."""
    heads: tl.constexpr = H * GROUP
    width: tl.constexpr = DV + RANK_V
    head, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(seq_starts + s)
    if tl.load(seq_starts + s + 1) - row != 1:
        return
    v_d, r_r = tl.arange(0, D_V), tl.arange(0, R)
    is_value_d = v_d < DV
    top = float("-inf")
    total = 0.0
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = 1.0
    out_d = tl.zeros([D_V], tl.float32)
    low_rank_r = tl.zeros([R], tl.float32)
    for split in range(0, splits):
        at = (s * splits + split) * heads + head
        part = tl.load(lse + at)
        new = tl.maximum(top, part)
        # lse is -inf for a split without visible tokens. All splits before it may have none either.
        keep = tl.where(top == float("-inf"), 0.0, tl.exp2(top - new))
        weight = tl.where(part == float("-inf"), 0.0, tl.exp2(part - new))
        top, total = new, total * keep + weight
        out_d = out_d * keep + weight * tl.load(partial + at * width + v_d, mask=is_value_d, other=0.0)
        if RANK_V > 0:
            low_rank = tl.load(partial + at * width + DV + r_r, mask=r_r < RANK_V, other=0.0)
            low_rank_r = low_rank_r * keep + weight * low_rank
    if RANK_V > 0:
        b_head = b_v + (tl.load(agent_ids + row) * H + head // GROUP) * RANK_V * DV
        for r in range(0, RANK_V):
            factor = tl.sum(tl.where(r_r == r, low_rank_r, 0.0), 0)
            out_d += factor * tl.load(b_head + r * DV + v_d, mask=is_value_d, other=0.0).to(tl.float32)
    at_out = out + (row * heads + head) * DV + v_d
    tl.store(at_out, (out_d / total).to(out.dtype.element_ty), mask=is_value_d)
