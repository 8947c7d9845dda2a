"""Cache writes against loops over tokens, in PyTorch and in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.kernels import cpp_library, ops
from lragent.kernels.write_cache import torch_scatter
from lragent.program.cache_schema import LowRankStream

PAGES, PAGE = 5, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Writers = tuple[Callable[..., Any], Callable[..., Any]]


@pytest.fixture(
    params=[
        "torch",
        pytest.param(
            "cpp", marks=pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")
        ),
    ]
)
def writers(request: pytest.FixtureRequest) -> Writers:
    """`write_kv` and `write_lr`; once the library is loaded the ops run its kernels."""
    if request.param == "torch":
        return torch_scatter.write_kv, torch_scatter.write_lr
    cpp_library.load()
    return ops.write_kv, ops.write_lr


def _rows(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`[T, H, D]` as a graph has it: a view of `[H, T, D]`."""
    return torch.randn(heads, tokens, dim).to(dtype).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_write_kv(writers: Writers, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    key, value = _rows(6, 2, 4, dtype), _rows(6, 2, 19, dtype)
    k_cache = torch.zeros(PAGES, 2, PAGE, 4, dtype=cache_dtype)
    v_cache = torch.zeros(PAGES, 2, PAGE, 19, dtype=cache_dtype)
    slots = torch.tensor([8, 9, 39, 3, 17, 24])
    writers[0](key, value, k_cache, v_cache, slots)
    expected = torch.zeros(PAGES, 2, PAGE, 4, dtype=cache_dtype)
    for t, slot in enumerate(slots.tolist()):
        expected[slot // PAGE, :, slot % PAGE] = key[t].to(cache_dtype)
        assert torch.equal(v_cache[slot // PAGE, :, slot % PAGE], value[t].to(cache_dtype))
    assert torch.equal(k_cache, expected)


def test_write_kv_of_many_tokens(writers: Writers) -> None:
    key, value = _rows(1000, 3, 8, torch.float32), _rows(1000, 3, 8, torch.float32)
    k_cache, v_cache = torch.zeros(200, 3, PAGE, 8), torch.zeros(200, 3, PAGE, 8)
    slots = torch.randperm(200 * PAGE)[:1000]
    writers[0](key, value, k_cache, v_cache, slots)
    assert torch.equal(k_cache.transpose(1, 2).flatten(0, 1)[slots], key)
    assert torch.equal(v_cache.transpose(1, 2).flatten(0, 1)[slots], value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lr_blocks", ["distinct", "per_agent"])
def test_write_lr(writers: Writers, lr_blocks: str, dtype: torch.dtype) -> None:
    stream = LowRankStream("m", ranks=(3, 0, 3, 12), shares_a_with=(0, 1, 0, 3))
    table = stream.lr_directory(lr_blocks, PAGES, PAGE)  # type: ignore[arg-type]
    cache = torch.zeros(stream.elements(lr_blocks, PAGES, PAGE), dtype=dtype)  # type: ignore[arg-type]
    lr = torch.randn(4, stream.width + 2)[:, 1:-1]
    # Agents keep different tokens: slot 0 is in the scratch page.
    slots = torch.tensor([[8, 9, 10, 39], [0, 0, 0, 0], [0, 9, 0, 39], [8, 0, 0, 38]])
    writers[1](lr, cache, table, slots)
    for agent, (offset, rank, source, writes) in enumerate(table[1:].tolist()):
        if not writes:
            continue
        block = cache[offset : offset + PAGES * PAGE * rank].view(PAGES * PAGE, rank)
        expected = torch.zeros_like(block)
        for t, slot in enumerate(slots[agent].tolist()):
            expected[slot] = lr[t, source : source + rank].to(dtype)
        assert torch.equal(block[PAGE:], expected[PAGE:])


@pytest.mark.parametrize("slot", [PAGES * PAGE, -(PAGES * PAGE) - 1])
def test_a_slot_outside_is_refused(writers: Writers, slot: int) -> None:
    k_cache, v_cache = torch.zeros(PAGES, 2, PAGE, 4), torch.zeros(PAGES, 2, PAGE, 4)
    with pytest.raises(IndexError):
        writers[0](torch.ones(1, 2, 4), torch.ones(1, 2, 4), k_cache, v_cache, torch.tensor([slot]))
    assert not k_cache.any()
    table = torch.tensor([[0, 0, 0, 0], [0, 2, 0, 1], [PAGES * PAGE * 2, 2, 2, 1]])
    cache = torch.zeros(PAGES * PAGE * 4)
    with pytest.raises(IndexError):
        writers[1](torch.ones(1, 4), cache, table, torch.tensor([[slot], [0]]))
    assert not cache[PAGES * PAGE * 2 :].any()


def test_equal_a_shares_a_block_only_in_distinct_columns() -> None:
    stream = LowRankStream("m", ranks=(3, 3), shares_a_with=(0, 0))
    shared, apart = stream.lr_directory("distinct", PAGES, PAGE), stream.lr_directory("per_agent", PAGES, PAGE)
    assert shared[1, 0] == shared[2, 0] and shared[:, 3].tolist() == [0, 1, 0]
    assert apart[1, 0] != apart[2, 0] and apart[:, 3].tolist() == [0, 1, 1]
    assert (stream.width, stream.elements("distinct", 1, 1), stream.elements("per_agent", 1, 1)) == (3, 3, 6)
