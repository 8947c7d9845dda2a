"""The shim makes bfloat16 exact, and is still needed: run by `tests/kernels/test_triton_interpreted.py`."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.interpreter import shim


@triton.jit
def _product(a, b, out, casts, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, product)
    tl.store(casts + at, product.to(tl.bfloat16))


@triton.jit
def _sum(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(a + at) + tl.load(a + at))


@triton.jit
def _beyond(a, out, reach, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(a + at + reach))


def _results() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out, casts = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    _product[(1,)](a, b, out, casts, N=16)
    return out, casts, a.float() @ b.float()


def test_without_the_shim_products_are_wrong() -> None:
    """If this fails, the interpreter has learnt bfloat16 and the shim can go."""
    out, _, exact = _results()
    assert float((out - exact).abs().max()) > 1


def test_with_the_shim_products_and_casts_are_exact() -> None:
    with shim.exact_bfloat16():
        out, casts, exact = _results()
    torch.testing.assert_close(out, exact)
    assert torch.equal(casts, out.bfloat16())


def test_other_arithmetic_is_refused() -> None:
    with shim.exact_bfloat16(), pytest.raises(Exception, match="cast to float32 first"):
        _sum[(1,)](torch.ones(16).bfloat16(), torch.ones(16).bfloat16(), N=16)


@pytest.mark.parametrize(("reach", "message"), [(1, "beyond the end of a"), (10_000, "outside every tensor")])
def test_an_access_outside_is_found(reach: int, message: str) -> None:
    a, out = torch.ones(16), torch.ones(16)
    with shim.watched({"a": a, "out": out}) as traffic:
        _beyond[(1,)](a, out, 0, N=16)
        assert (traffic.loaded, traffic.stored) == ({"a": 64}, {"out": 64})
        with pytest.raises(Exception, match=message):
            _beyond[(1,)](a, out, reach, N=16)
