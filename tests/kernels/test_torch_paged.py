"""The torch path against the reference: its error to float64 is at most twice the reference's own, plus a rounding."""

from __future__ import annotations

import pytest
import torch

from lragent.kernels.flash_lora_attention import reference, torch_paged
from tests.kernels.attention_cases import CASES, Case, call, in_double, rounded


def _check(case: Case, dtype: torch.dtype) -> None:
    values = case.build(dtype)
    exact = call(reference.flash_lora_attention, in_double(values))
    plain = call(reference.flash_lora_attention, values)
    found = call(torch_paged.flash_lora_attention, values)
    assert found.dtype == dtype and found.shape == exact.shape
    own = float((plain.double() - exact).abs().max())
    rounding = torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((found.double() - exact).abs().max()) <= 2 * own + rounding


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
