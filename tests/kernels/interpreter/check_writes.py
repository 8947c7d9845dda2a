"""The Triton cache writes against those of PyTorch, bit by bit: run by `tests/kernels/test_triton_interpreted.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lragent.kernels.write_cache import torch_scatter, triton_scatter
from lragent.program.cache_schema import LowRankStream
from tests.kernels.interpreter import shim

PAGES, PAGE = 5, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _exact_bfloat16() -> Iterator[None]:
    with shim.exact_bfloat16():
        yield


def _rows(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`[T, H, D]` as a graph has it: a view of `[H, T, D]`."""
    return torch.randn(heads, tokens, dim).to(dtype).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_write_kv(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    key, value = _rows(6, 2, 4, dtype), _rows(6, 2, 19, dtype)
    slots = torch.tensor([8, 9, 39, 3, 17, 24])
    caches = [torch.zeros(PAGES, 2, PAGE, dim, dtype=cache_dtype) for dim in (4, 19, 4, 19)]
    with shim.watched({"key": key, "value": value, "k": caches[0], "v": caches[1], "slots": slots}) as traffic:
        triton_scatter.write_kv(key, value, caches[0], caches[1], slots)
    torch_scatter.write_kv(key, value, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    size = caches[0].element_size()
    assert traffic.stored == {"k": 6 * 2 * 4 * size, "v": 6 * 2 * 19 * size}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lr_blocks", ["distinct", "per_agent"])
def test_write_lr(lr_blocks: str, dtype: torch.dtype) -> None:
    stream = LowRankStream("m", ranks=(3, 0, 3, 70), shares_a_with=(0, 1, 0, 3))
    table = stream.lr_directory(lr_blocks, PAGES, PAGE)  # type: ignore[arg-type]
    found, expected = (torch.zeros(stream.elements(lr_blocks, PAGES, PAGE), dtype=dtype) for _ in range(2))  # type: ignore[arg-type]
    lr = torch.randn(4, stream.width + 2)[:, 1:-1]
    slots = torch.tensor([[8, 9, 10, 39], [0, 0, 0, 0], [1, 9, 2, 39], [8, 3, 4, 38]])
    with shim.watched({"lr": lr, "cache": found, "table": table, "slots": slots}):
        triton_scatter.write_lr(lr, found, table, slots)
    torch_scatter.write_lr(lr, expected, table, slots)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("slot", [PAGES * PAGE, -1, 1 << 40])
def test_a_slot_outside_is_left_out(slot: int) -> None:
    k_cache, v_cache = torch.zeros(PAGES, 2, PAGE, 4), torch.zeros(PAGES, 2, PAGE, 4)
    triton_scatter.write_kv(torch.ones(1, 2, 4), torch.ones(1, 2, 4), k_cache, v_cache, torch.tensor([slot]))
    assert not k_cache.any() and not v_cache.any()
    table = torch.tensor([[0, 0, 0, 0], [0, 2, 0, 1], [PAGES * PAGE * 2, 2, 2, 1]])
    cache = torch.zeros(PAGES * PAGE * 4)
    triton_scatter.write_lr(torch.ones(1, 4), cache, table, torch.tensor([[slot], [slot]]))
    assert not cache.any()
