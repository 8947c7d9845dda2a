"""Tiles of the Triton kernels: the combination that is miscompiled is refused, and never chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch

from benchmarks import triton_tiles
from benchmarks.attention_calls import Heads
from lragent.errors import InternalError
from lragent.kernels import triton_library
from tests.kernels.attention_cases import Case

if not triton_library.is_installed():
    pytest.skip("triton isn't installed", allow_module_level=True)

from lragent.kernels.flash_lora_attention.triton import launch
from lragent.kernels.flash_lora_attention.triton.variants import (
    MiscompiledTiles,
    Target,
    Tiles,
    Variant,
    prefill_constants,
    prefill_tiles,
)

USUAL = Variant(
    heads=8, group=4, page_size=16, k_dim=128, v_dim=128, k_rank=8, v_rank=8, dot_dtype=torch.bfloat16,
    final=True, rope=True, norm=False, sinks=False, window=0, softcap=0.0,
)  # fmt: skip
MISCOMPILED = Tiles(rows=128, tokens=64, channels=128, warps=8, stages=2)


def usual_variants() -> Iterator[Variant]:
    ranks = (0, 1, 8, 16, 17, 32, 64, 128)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for k_rank, v_rank, dim, group, dtype, final in product(
        ranks, ranks, (64, 80, 128, 256), (1, 3, 4, 7, 71), dtypes, (True, False)
    ):
        yield replace(
            USUAL, k_rank=k_rank, v_rank=v_rank, k_dim=dim, v_dim=dim, group=group, dot_dtype=dtype, final=final
        )
    yield replace(USUAL, k_dim=192, v_dim=128, group=1)


@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("tokens", [64, 128])
def test_keys_of_a_small_rank_in_wide_tiles_are_refused_on_hopper(rank: int, tokens: int) -> None:
    variant, tiles = replace(USUAL, k_rank=rank), replace(MISCOMPILED, tokens=tokens)
    with pytest.raises(MiscompiledTiles, match=rf"{tokens} tokens on sm_90 .* at most 16") as raised:
        prefill_constants(variant, tiles, "sm_90")
    assert isinstance(raised.value, InternalError)
    assert prefill_constants(variant, tiles, "sm_80") == prefill_constants(variant, tiles, None)


@pytest.mark.parametrize(
    ("variant", "tiles"),
    [
        (USUAL, replace(MISCOMPILED, tokens=32)),
        (replace(USUAL, k_rank=0), MISCOMPILED),
        (replace(USUAL, k_rank=17), MISCOMPILED),
        (USUAL, replace(MISCOMPILED, least_rank=64)),
    ],
    ids=["fewer tokens", "no adapter on K", "larger rank", "padded to a larger rank"],
)
def test_what_differs_in_one_size_is_not_refused(variant: Variant, tiles: Tiles) -> None:
    assert prefill_constants(variant, tiles, "sm_90")["N"] == tiles.tokens


@pytest.mark.parametrize("target", get_args(Target))
def test_no_usual_variant_gets_such_tiles(target: Target) -> None:
    walked = 0
    for variant in usual_variants():
        prefill_constants(variant, prefill_tiles(variant, target), target)
        walked += 1
    assert walked > 7000


def test_a_launch_with_such_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched: there is no GPU here."""
    monkeypatch.setattr(launch, "target_of", lambda device: "sm_90")
    call = Case("chunk", sequences=((40, 9, 1),), k_dim=64, v_dim=64).build()
    config = launch.LaunchConfig(decode=MISCOMPILED, prefill=replace(MISCOMPILED, channels=64), splits=1)
    with pytest.raises(MiscompiledTiles):
        launch.flash_lora_attention(call, config)


def test_the_benchmark_skips_such_tiles_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(triton_tiles, "GPU", torch.device("cpu"))
    job = triton_tiles.Job("prefill", Heads(1, 2, 64), 8, with_keys=True, tiles=replace(MISCOMPILED, channels=64))
    assert triton_tiles.refusal(job).startswith("prefill tiles of 64 tokens on sm_90")
