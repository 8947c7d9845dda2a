"""The torch path against the reference: its error to float64 is at most twice the reference's own, plus a rounding."""

from __future__ import annotations

import pytest
import torch

from lragent.kernels.flash_lora_attention import torch_paged
from tests.kernels.attention_cases import CASES, WIDE_NORM_CASES, Case, assert_as_exact_as_reference, rounded


def _check(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_reference(torch_paged.flash_lora_attention, case.build(dtype))


@pytest.mark.parametrize("case", CASES + WIDE_NORM_CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    _check(case, torch.float32)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_cache(case: Case, dtype: torch.dtype) -> None:
    _check(rounded(case, torch.bfloat16), dtype)


def test_prefill_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_paged, "SCORE_BYTES", 6 * 40 * 4 * 5)  # five rows of forty keys
    for case in CASES:
        _check(case, torch.float32)
