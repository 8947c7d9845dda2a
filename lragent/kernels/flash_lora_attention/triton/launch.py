"""Launches the attention kernels. The host reads no values from the device, so a step can be captured as a CUDA graph.

Grid sizes are upper bounds computed from shapes; programs without work return at once. Sequences with one query token
run in the split decode kernel, all others in the prefill kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lragent.errors import InternalError
from lragent.kernels.attention_call import AttentionCall
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

# A split reads at least this many tokens. Splits are added until the device has this many programs per SM.
SPLIT_TOKENS = 128
PROGRAMS_PER_SM = 8


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles of the kernels and number of splits of one call."""

    decode: Tiles
    prefill: Tiles
    splits: int


def flash_lora_attention(call: AttentionCall, config: LaunchConfig | None = None) -> Tensor:
    """`lragent::flash_lora_attention_triton`: `[T, Hq, Dv]`.

    Sequences may be empty. Tokens after the last sequence belong to no sequence; their output rows are not written.

    Raises:
        MiscompiledTiles: Triton compiles the prefill tiles of `config` wrongly on the device.
    """
    if not (call.k_cache.is_contiguous() and call.v_cache.is_contiguous()):
        raise InternalError("cache pages are not contiguous")
    tokens, query_heads, k_dim = call.query_THqDk.shape
    _, heads, page_size, v_dim = call.v_cache.shape
    sequences, pages_per_seq = call.page_table_SM.shape
    out = call.empty_output()
    if tokens == 0:
        return out
    variant = Variant(
        heads=heads,
        group=query_heads // heads,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        k_rank=call.b_k.shape[2] if call.b_k is not None else 0,
        v_rank=call.b_v.shape[2] if call.b_v is not None else 0,
        dot_dtype=dot_dtype(call.query_THqDk.dtype, call.k_cache.dtype, call.v_cache.dtype),
        final=call.key_is_final,
        rope=call.rope_cos is not None,
        norm=call.norm_weight is not None,
        sinks=call.sinks_Hq is not None,
        window=call.window,
        softcap=call.softcap,
    )
    if config is None:
        config = _launch_config(variant, sequences, pages_per_seq * page_size, call.query_THqDk.device)
    query, page_table = call.query_THqDk.contiguous(), call.page_table_SM.contiguous()
    b_k, b_v = (b.contiguous() if b is not None else None for b in (call.b_k, call.b_v))
    common = (
        query, call.k_cache, call.v_cache, call.agent_ids_T, call.seq_starts, call.context_lens_S, page_table,
        call.lr_k, call.lr_k_table, b_k, call.lr_v, call.lr_v_table,
    )  # fmt: skip
    transform = (call.rope_cos, call.rope_sin, call.rope_partner, call.norm_weight)
    if tokens > sequences:
        tiles = config.prefill
        blocks = tokens // (tiles.rows // variant.group) + sequences
        prefill_kernel[(heads, blocks)](
            *common, b_v, *transform, call.sinks_Hq, out, call.norm_eps, call.scale, pages_per_seq, sequences,
            **prefill_constants(variant, tiles, target_of(query.device)), **tiles.options(),
        )  # fmt: skip
    if tokens == sequences or sequences > 1:
        tiles = config.decode
        head_blocks = -(-variant.group // tiles.rows)
        parts = (sequences, config.splits, query_heads)
        partial = query.new_empty(*parts, v_dim + variant.v_rank, dtype=torch.float32)
        lse = query.new_empty(parts, dtype=torch.float32)
        decode_kernel[(heads * head_blocks, sequences, config.splits)](
            *common, *transform, partial, lse, call.norm_eps, call.scale, pages_per_seq, config.splits,
            **decode_constants(variant, tiles), **tiles.options(),
        )  # fmt: skip
        reduce_kernel[(query_heads, sequences)](
            partial, lse, call.agent_ids_T, call.seq_starts, b_v, call.sinks_Hq, out, config.splits,
            **reduce_constants(variant),
        )  # fmt: skip
    return out


def _launch_config(variant: Variant, sequences: int, longest: int, device: torch.device) -> LaunchConfig:
    """Tiles for the device, and enough splits to keep it busy if every context fills its page table."""
    target, sms = _device_facts(device.index)
    decode = decode_tiles(variant, target)
    programs = sequences * variant.heads * -(-variant.group // decode.rows)
    wanted = -(-sms * PROGRAMS_PER_SM // programs)
    return LaunchConfig(decode, prefill_tiles(variant, target), max(1, min(wanted, -(-longest // SPLIT_TOKENS))))


def target_of(device: torch.device) -> Target | None:
    """Compile target of a device; None for the CPU, where kernels are interpreted."""
    return _device_facts(device.index)[0] if device.type == "cuda" else None


@cache
def _device_facts(index: int) -> tuple[Target, int]:
    """Compile target of a device, and its number of SMs (compute units)."""
    sms = int(torch.cuda.get_device_properties(index).multi_processor_count)
    if torch.version.hip is not None:
        return "gfx942", sms
    return "sm_90" if torch.cuda.get_device_capability(index)[0] == 9 else "sm_80", sms
