"""Variants of the attention kernels (everything that is a compile-time constant), and their tile shapes and warps.

Tile shapes were chosen so that kernels spill no registers on sm_80, sm_90 and gfx942 and fit into shared memory.
`tests/kernels/compiled` checks this and names the one variant that still spills. For usual variants on sm_90, the
fastest shapes on an H200 were chosen (`benchmarks/triton_tiles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from lragent.errors import InternalError

Target = Literal["sm_80", "sm_90", "gfx942"]

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Each dimension of a `tl.dot` (channels, tokens, rank) has at least this size.
SMALLEST = 16
# Prefill on Hopper: Triton 3.6 miscompiles tiles of at least this many tokens if the padded rank of K is at most this.
# Results are wrong, or loads are outside the cache. Tiles of 64 tokens were tested, wider tiles were not.
MISCOMPILED_TOKENS, MISCOMPILED_RANK = 64, 16


class MiscompiledTiles(InternalError):
    """Tiles for which Triton is known to compile a wrong kernel on a target."""


@dataclass(frozen=True)
class Variant:
    """Shapes and features of a call; a rank is that of lora_b, 0 if K or V has no adapter."""

    heads: int
    group: int
    page_size: int
    k_dim: int
    v_dim: int
    k_rank: int
    v_rank: int
    dot_dtype: torch.dtype
    final: bool
    rope: bool
    norm: bool
    sinks: bool
    window: int
    softcap: float

    @property
    def is_half(self) -> bool:
        return self.dot_dtype != torch.float32

    @property
    def rank(self) -> int:
        """The larger of both ranks."""
        return max(self.k_rank, self.v_rank)

    @property
    def dim(self) -> int:
        """The larger of both head dims."""
        return max(self.k_dim, self.v_dim)

    def shared_constants(self) -> dict[str, Any]:
        """Compile-time arguments of both the decode and the prefill kernel."""
        return {
            "H": self.heads,
            "GROUP": self.group,
            "P": self.page_size,
            "DK": self.k_dim,
            "DV": self.v_dim,
            "RANK_K": self.k_rank,
            "RANK_V": self.v_rank,
            "FINAL": self.final,
            "ROPE": self.rope,
            "NORM": self.norm,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "D_V": padded(self.v_dim),
            "DOT": _TRITON_DTYPES[self.dot_dtype],
        }


@dataclass(frozen=True)
class Tiles:
    """Tile shape and launch options of one kernel.

    Args:
        rows: query heads per decode program, or (query, head) rows per prefill program.
        tokens, channels: shape of the part of a key tile that is rebuilt at once.
        unroll: unrolls the loop over the parts of a tile, so that loads are pipelined across tiles; needs registers.
        least_rank: ranks are padded to at least this; with 64, sm_80 distributes a product over more warps.
    """

    rows: int
    tokens: int
    channels: int
    warps: int
    stages: int
    unroll: bool = False
    least_rank: int = SMALLEST

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def constants(self, variant: Variant) -> dict[str, int]:
        parts = -(-variant.k_dim // self.channels) if self.unroll else 1
        r_k, r_v = (max(self.least_rank, padded(rank)) if rank else 0 for rank in (variant.k_rank, variant.v_rank))
        return {"N": self.tokens, "C": self.channels, "UNROLL": parts, "R_K": r_k, "R_V": r_v}


def padded(size: int) -> int:
    return max(SMALLEST, int(triton.next_power_of_2(size)))


def dot_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Dtype of the operands of products: the half-precision dtype that all tensors share, else float32."""
    first = dtypes[0]
    return first if first in (torch.float16, torch.bfloat16) and set(dtypes) == {first} else torch.float32


def _was_timed(variant: Variant) -> bool:
    """True if the tiles of a variant were chosen by their time on an H200 (`benchmarks/triton_tiles.py`)."""
    return variant.is_half and variant.final and variant.dim <= 128 and variant.rank <= 64


def decode_tiles(variant: Variant, target: Target) -> Tiles:
    """Tiles of a decode kernel."""
    stages = 1 if target == "gfx942" else 2
    rows = SMALLEST if target == "gfx942" or variant.group > 8 else 8
    if not variant.is_half:
        return Tiles(rows, tokens=32, channels=16, warps=8, stages=stages)
    rank, dim = variant.rank, variant.dim
    if target == "sm_90" and _was_timed(variant):
        if variant.k_rank:
            channels = 64 if rank > 16 else padded(variant.k_dim)
            return Tiles(rows, tokens=32, channels=channels, warps=4, stages=2, unroll=rank > 16)
        return Tiles(rows, tokens=128 if dim <= 64 else 64, channels=64, warps=4, stages=2, unroll=rank <= 16)
    tokens, warps = 64, 4
    if target == "sm_90" and rank > 64:
        tokens, warps = 32 if dim <= 64 else 64, 8 if dim > 128 else 4
    if target == "sm_80" and dim <= 64:
        stages, warps = 1 if rank <= 16 else 2, 8 if rank > 64 else 4
    if target == "sm_80" and dim > 128 and rank > 16:
        tokens, warps = 64 if rank > 64 else 32, 8 if rank > 64 else 4
    if target == "sm_80" and dim > 128 and rank > 64 and not variant.final:
        return Tiles(rows, tokens, channels=16, warps=warps, stages=1)
    return Tiles(rows, tokens, channels=32, warps=warps, stages=stages)


def prefill_tiles(variant: Variant, target: Target) -> Tiles:
    """Tiles of a prefill kernel; they have at least as many rows as a KV head has query heads."""
    rows = int(triton.next_power_of_2(variant.group))
    rank, dim = variant.rank, variant.dim
    if not variant.is_half:
        return Tiles(max(rows, 16), tokens=16, channels=16, warps=8, stages=1)
    if target == "gfx942":
        return Tiles(max(rows, 64), tokens=64, channels=32, warps=4, stages=1)
    if target == "sm_90" and _was_timed(variant):
        if rank > 16:
            tokens = 32 if variant.k_rank else 64
            return Tiles(max(rows, 128), tokens, channels=64, warps=8, stages=2, unroll=True)
        # Keys rebuilt from a small rank need tiles below MISCOMPILED_TOKENS.
        tokens, stages = (32, 2) if variant.k_rank else (64, 3)
        return Tiles(max(rows, 128), tokens, padded(variant.k_dim), warps=4 if dim <= 64 else 8, stages=stages)
    if target == "sm_90" and dim <= 128 and rank <= 16:
        return Tiles(max(rows, 128), tokens=32, channels=64, warps=8, stages=2)
    if target == "sm_90" and (dim <= 128 or rank <= 16):
        return Tiles(
            max(rows, 64), tokens=32 if dim > 128 and not variant.final else 16, channels=32, warps=8, stages=2
        )
    if target == "sm_80" and dim <= 128 and rank <= 16:
        return Tiles(max(rows, 64), tokens=16, channels=32 if variant.final or dim <= 64 else 16, warps=8, stages=2)
    if target == "sm_80" and rank > 64 and not variant.final and not 64 < dim <= 128:
        return Tiles(max(rows, 16 if dim > 128 else 32), tokens=16, channels=16, warps=8, stages=1)
    narrow = rank > 64 if dim > 128 else target == "sm_80" and dim > 64 and not variant.final
    tokens = 16 if narrow else 32
    return Tiles(max(rows, 32), tokens, channels=16, warps=8, stages=2, least_rank=64 if dim > 128 else SMALLEST)


# These are needed once per layer and step, and computing them takes as long as a launch.
@cache
def decode_constants(variant: Variant, tiles: Tiles) -> Mapping[str, Any]:
    return variant.shared_constants() | tiles.constants(variant) | {"G": tiles.rows}


@cache
def prefill_constants(variant: Variant, tiles: Tiles, target: Target | None) -> Mapping[str, Any]:
    """Compile-time arguments of the prefill kernel.

    Args:
        target: compile target; None: the kernel is interpreted.

    Raises:
        MiscompiledTiles: Triton compiles these tiles wrongly on the target.
    """
    constants = variant.shared_constants() | tiles.constants(variant) | {"M": tiles.rows, "SINKS": variant.sinks}
    small_rank = 0 < constants["R_K"] <= MISCOMPILED_RANK
    if target == "sm_90" and small_rank and tiles.tokens >= MISCOMPILED_TOKENS:
        raise MiscompiledTiles(
            f"prefill tiles of {tiles.tokens} tokens on sm_90 are miscompiled for a K rank of at most "
            f"{MISCOMPILED_RANK}: {tiles}"
        )
    return constants


@cache
def reduce_constants(variant: Variant) -> Mapping[str, Any]:
    shared = variant.shared_constants()
    own = {"R": padded(variant.v_rank), "SINKS": variant.sinks}
    return {name: shared[name] for name in ("H", "GROUP", "DV", "RANK_V", "D_V")} | own
