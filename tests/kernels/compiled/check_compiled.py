"""Every kind of variant compiles for every target, within registers and shared memory, with tensor cores.

Run by `tests/kernels/test_triton_compiled.py`. The figures hold for the Triton version of the `gpu` extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from lragent.kernels.flash_lora_attention.triton.decode import decode_kernel
from lragent.kernels.flash_lora_attention.triton.prefill import prefill_kernel
from lragent.kernels.flash_lora_attention.triton.reduce import reduce_kernel
from lragent.kernels.flash_lora_attention.triton.variants import (
    Target,
    Variant,
    decode_constants,
    decode_tiles,
    prefill_constants,
    prefill_tiles,
    reduce_constants,
)
from lragent.kernels.write_cache.triton_kernels import write_kv_kernel, write_lr_kernel
from tests.kernels.compiled.ahead_of_time import TARGETS, Resources, compiled

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROTATED = Variant(
    heads=8, group=4, page_size=16, k_dim=128, v_dim=128, k_rank=16, v_rank=16, dot_dtype=torch.bfloat16,
    final=True, rope=True, norm=False, sinks=False, window=0, softcap=0.0,
)  # fmt: skip
EVERYTHING = replace(ROTATED, final=False, norm=True, sinks=True, window=1000, softcap=30.0)
FEATURES = {"rotated": ROTATED, "everything": EVERYTHING}


def sized(variant: Variant, dim: int, rank: int, **other: Any) -> Variant:
    return replace(variant, k_dim=dim, v_dim=dim, k_rank=rank, v_rank=rank, **other)


USUAL = {
    "128, r 16": ROTATED,
    "128, r 16, everything": EVERYTHING,
    "64, r 8": sized(ROTATED, 64, 8, group=3),
}
SIZES = {
    f"{name}, {dim}, r {rank}": sized(variant, dim, rank)
    for name, variant in FEATURES.items()
    for dim in (64, 128, 256)
    for rank in (0, 8, 32, 64, 128)
}
SHAPES = {
    f"{name}, {shape}": replace(variant, **change)
    for name, variant in FEATURES.items()
    for shape, change in {
        "one head a group": {"group": 1},
        "seven heads a group": {"group": 7},
        "71 heads a group": {"group": 71, "heads": 1, "k_dim": 64, "v_dim": 64},
        "80 channels": {"k_dim": 80, "v_dim": 80},
        "other value dim": {"k_dim": 192, "v_dim": 128, "group": 1},
        "value only": {"k_rank": 0},
        "key only": {"v_rank": 0},
        "large pages": {"page_size": 64},
        "no rotation": {"rope": False},
        "float16": {"dot_dtype": torch.float16},
        "float32": {"dot_dtype": torch.float32},
        "float32, 64 channels": {"dot_dtype": torch.float32, "k_dim": 64, "v_dim": 64},
        "float32, r 64": {"dot_dtype": torch.float32, "k_rank": 64, "v_rank": 64},
    }.items()
}


def _types(variant: Variant) -> dict[str, str]:
    dtype = "*" + NAMES[variant.dot_dtype]
    data = dict.fromkeys(("query", "k_cache", "v_cache", "lr_k", "b_k", "lr_v", "b_v", "sinks", "out"), dtype)
    indices = ("agent_ids", "seq_starts", "context_lens", "page_table", "lr_k_table", "lr_v_table", "rope_partner")
    tables = ("rope_cos", "rope_sin", "norm_weight", "partial", "lse")
    scalars = {"norm_eps": "fp32", "scale": "fp32"}
    return data | dict.fromkeys(indices, "*i64") | dict.fromkeys(tables, "*fp32") | scalars


def _absent(variant: Variant) -> dict[str, None]:
    names: list[str] = []
    names += [] if variant.k_rank else ["lr_k", "lr_k_table", "b_k"]
    names += [] if variant.v_rank else ["lr_v", "lr_v_table", "b_v"]
    names += [] if variant.rope else ["rope_cos", "rope_sin", "rope_partner"]
    names += [] if variant.norm else ["norm_weight"]
    names += [] if variant.sinks else ["sinks"]
    return dict.fromkeys(names)


def _compiled(kernel: Any, variant: Variant, target: Target, constants: Mapping[str, Any], **options: int) -> Resources:
    absent = {name: None for name in _absent(variant) if name in kernel.arg_names}
    return compiled(kernel, _types(variant), {**constants, **absent}, target, **options)


def attention(kind: str, variant: Variant, target: Target) -> Resources:
    if kind == "decode":
        tiles = decode_tiles(variant, target)
        return _compiled(decode_kernel, variant, target, decode_constants(variant, tiles), **tiles.options())
    tiles = prefill_tiles(variant, target)
    return _compiled(prefill_kernel, variant, target, prefill_constants(variant, tiles, target), **tiles.options())


# Bytes that a variant spills with the best tiles that were found.
SPILLED = {("prefill", "everything, 256, r 128", "sm_80"): 10}


def _check(kind: str, variant: Variant, target: Target, spilled: int = 0) -> None:
    found = attention(kind, variant, target)
    print(kind, target, found)
    assert found.spilled == spilled, found
    assert found.shared <= TARGETS[target][1], found
    assert found.products > 0 or not variant.is_half, found
    assert found.wide_loads > 0, found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("variant", USUAL.values(), ids=USUAL)
def test_usual_variants(kind: str, variant: Variant, target: Target) -> None:
    _check(kind, variant, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("name", SIZES | SHAPES)
def test_every_variant(kind: str, name: str, target: Target) -> None:
    _check(kind, (SIZES | SHAPES)[name], target, SPILLED.get((kind, name, target), 0))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", [ROTATED, sized(EVERYTHING, 256, 128)], ids=["128, r 16", "256, r 128"])
def test_reduce(variant: Variant, target: Target) -> None:
    assert _compiled(reduce_kernel, variant, target, reduce_constants(variant)).spilled == 0


@pytest.mark.parametrize("target", TARGETS)
def test_writes(target: Target) -> None:
    tensors = {"key": "*bf16", "value": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "slots": "*i64"}
    sizes = {"H": 8, "P": 16, "DK": 128, "DV": 128, "D": 128}
    assert compiled(write_kv_kernel, tensors, sizes, target, num_warps=1).spilled == 0
    tensors = {"lr": "*bf16", "lr_cache": "*bf16", "lr_table": "*i64", "slots": "*i64"}
    assert compiled(write_lr_kernel, tensors, {"ROWS": 4, "R": 64}, target, num_warps=1).spilled == 0


def test_a_spill_would_be_found() -> None:
    tiles = replace(prefill_tiles(EVERYTHING, "sm_80"), rows=128, tokens=64)
    constants = prefill_constants(EVERYTHING, tiles, "sm_80")
    assert _compiled(prefill_kernel, EVERYTHING, "sm_80", constants, **tiles.options()).spilled > 0
