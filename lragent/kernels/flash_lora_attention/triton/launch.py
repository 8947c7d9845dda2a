"""Launches the attention kernels: nothing here looks at the device's values, so a step can be a CUDA graph.

Grids are upper bounds from shapes; programs without work leave at once. Sequences with one query token go through the
split decode kernel, all others through the prefill kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lragent.errors import InternalError
from lragent.kernels.flash_lora_attention.triton.decode import decode_kernel
from lragent.kernels.flash_lora_attention.triton.prefill import prefill_kernel
from lragent.kernels.flash_lora_attention.triton.reduce import reduce_kernel
from lragent.kernels.flash_lora_attention.triton.variants import (
    Target,
    Tiles,
    Variant,
    decode_constants,
    decode_tiles,
    dot_dtype,
    prefill_constants,
    prefill_tiles,
    reduce_constants,
)

# A split reads at least this many tokens; splits are added until a device has this many programs a processor.
SPLIT_TOKENS = 128
PROGRAMS_A_PROCESSOR = 8


@dataclass(frozen=True)
class Plan:
    """How one call is launched; tests choose their own."""

    decode: Tiles
    prefill: Tiles
    splits: int


def flash_lora_attention(
    query_THqDk: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    agent_ids_T: Tensor,
    seq_starts: Tensor,
    context_lens_S: Tensor,
    page_table_SM: Tensor,
    lr_k: Tensor | None,
    lr_k_table: Tensor | None,
    b_k: Tensor | None,
    lr_v: Tensor | None,
    lr_v_table: Tensor | None,
    b_v: Tensor | None,
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    rope_partner: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    key_is_final: bool,
    sinks_Hq: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    plan: Plan | None = None,
) -> Tensor:
    """See `lragent::flash_lora_attention` in `lragent.kernels.ops`: `[T, Hq, Dv]`.

    Sequences may be empty, and tokens after the last sequence belong to none: their rows are left as they are.

    Raises:
        MiscompiledTiles: `plan` has prefill tiles that are known to give wrong numbers on the device.
    """
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise InternalError("cache pages are not contiguous")
    tokens, query_heads, k_dim = query_THqDk.shape
    _, heads, page_size, v_dim = v_cache.shape
    sequences, columns = page_table_SM.shape
    out = query_THqDk.new_empty(tokens, query_heads, v_dim)
    if tokens == 0:
        return out
    variant = Variant(
        heads=heads,
        group=query_heads // heads,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        k_rank=b_k.shape[2] if b_k is not None else 0,
        v_rank=b_v.shape[2] if b_v is not None else 0,
        dot_dtype=dot_dtype(query_THqDk.dtype, k_cache.dtype, v_cache.dtype),
        final=key_is_final,
        rope=rope_cos is not None,
        norm=norm_weight is not None,
        sinks=sinks_Hq is not None,
        window=window,
        softcap=softcap,
    )
    if plan is None:
        plan = _plan(variant, sequences, columns * page_size, query_THqDk.device)
    query, page_table = query_THqDk.contiguous(), page_table_SM.contiguous()
    b_k, b_v = (b.contiguous() if b is not None else None for b in (b_k, b_v))
    common = (
        query, k_cache, v_cache, agent_ids_T, seq_starts, context_lens_S, page_table,
        lr_k, lr_k_table, b_k, lr_v, lr_v_table,
    )  # fmt: skip
    transform = (rope_cos, rope_sin, rope_partner, norm_weight)
    if tokens > sequences:
        tiles = plan.prefill
        blocks = tokens // (tiles.rows // variant.group) + sequences
        prefill_kernel[(heads, blocks)](
            *common, b_v, *transform, sinks_Hq, out, norm_eps, scale, columns, sequences,
            **prefill_constants(variant, tiles, target_of(query.device)), **tiles.options(),
        )  # fmt: skip
    if tokens == sequences or sequences > 1:
        tiles = plan.decode
        head_blocks = -(-variant.group // tiles.rows)
        parts = (sequences, plan.splits, query_heads)
        partial = query.new_empty(*parts, v_dim + variant.v_rank, dtype=torch.float32)
        lse = query.new_empty(parts, dtype=torch.float32)
        decode_kernel[(heads * head_blocks, sequences, plan.splits)](
            *common, *transform, partial, lse, norm_eps, scale, columns, plan.splits,
            **decode_constants(variant, tiles), **tiles.options(),
        )  # fmt: skip
        reduce_kernel[(query_heads, sequences)](
            partial, lse, agent_ids_T, seq_starts, b_v, sinks_Hq, out, plan.splits, **reduce_constants(variant)
        )
    return out


def _plan(variant: Variant, sequences: int, longest: int, device: torch.device) -> Plan:
    """Tiles for the device, and as many splits as keep it busy if all contexts are as long as the page table allows."""
    target, processors = _device_facts(device.index)
    decode = decode_tiles(variant, target)
    programs = sequences * variant.heads * -(-variant.group // decode.rows)
    wanted = -(-processors * PROGRAMS_A_PROCESSOR // programs)
    return Plan(decode, prefill_tiles(variant, target), max(1, min(wanted, -(-longest // SPLIT_TOKENS))))


def target_of(device: torch.device) -> Target | None:
    """The compile target whose tiles a device uses; None for the CPU, where kernels are interpreted."""
    return _device_facts(device.index)[0] if device.type == "cuda" else None


@cache
def _device_facts(index: int) -> tuple[Target, int]:
    """The compile target whose tiles a device uses, and its number of processors."""
    processors = int(torch.cuda.get_device_properties(index).multi_processor_count)
    if torch.version.hip is not None:
        return "gfx942", processors
    return "sm_90" if torch.cuda.get_device_capability(index)[0] == 9 else "sm_80", processors
