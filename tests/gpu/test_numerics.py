"""The Triton op on the device against the reference: float32 as all implementations, half precision as in its dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lragent.kernels import ops, triton_library
from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.write_cache import torch_scatter
from tests.kernels.attention_cases import (
    CASES,
    Case,
    assert_as_exact_as_half_precision,
    assert_as_exact_as_reference,
    changed,
    kernel_of,
)

pytestmark = pytest.mark.gpu

LONG = ((700, 1, 1), (1500, 1, 3), (300, 200, 1), (90, 60, 3), (300, 9, (1, 1, 1, 3, 3, 3, 2, 2, 0)), (1, 1, 0))


triton_op = kernel_of(triton_library.ATTENTION)


def on_device(call: AttentionCall) -> AttentionCall:
    return changed(call, Tensor.cuda)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    assert_as_exact_as_reference(triton_op, on_device(case.build()))
    assert_as_exact_as_reference(triton_op, on_device(replace(case, sequences=LONG).build()))


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("final", "adapted_k"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("ranks", [(16, 0, 8), (64, 0, 33)], ids=str)
def test_half_precision(
    dims: tuple[int, int], dtype: torch.dtype, final: bool, adapted_k: bool, ranks: tuple[int, ...]
) -> None:
    case = Case(
        "half", sequences=LONG, k_dim=dims[0], v_dim=dims[1], ranks=ranks, cache_dtype=dtype, final=final,
        norm=not final, adapted_k=adapted_k,
    )  # fmt: skip
    assert_as_exact_as_half_precision(triton_op, on_device(case.build(dtype)))


def test_writes() -> None:
    key, value = torch.randn(5, 2, 64, device="cuda"), torch.randn(5, 2, 32, device="cuda")
    caches = [torch.zeros(4, 2, 16, dim, device="cuda", dtype=torch.bfloat16) for dim in (64, 32, 64, 32)]
    slots = torch.tensor([16, 17, 40, 63, 5], device="cuda")
    ops.write_kv(key, value, caches[0], caches[1], slots)
    torch_scatter.write_kv(key, value, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
