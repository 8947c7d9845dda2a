"""Cache writes against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from lragent.kernels import ops
from lragent.kernels.cache_schema import LowRankStream

PAGES, PAGE = 5, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_kv(dtype: torch.dtype) -> None:
    key, value = torch.randn(6, 2, 4), torch.randn(6, 2, 3)
    k_cache, v_cache = torch.zeros(PAGES, 2, PAGE, 4, dtype=dtype), torch.zeros(PAGES, 2, PAGE, 3, dtype=dtype)
    slots = torch.tensor([8, 9, 39, 3, 17, 24])
    ops.write_kv(key, value, k_cache, v_cache, slots)
    expected = torch.zeros(PAGES, 2, PAGE, 4, dtype=dtype)
    for t, slot in enumerate(slots.tolist()):
        expected[slot // PAGE, :, slot % PAGE] = key[t].to(dtype)
        assert torch.equal(v_cache[slot // PAGE, :, slot % PAGE], value[t].to(dtype))
    assert torch.equal(k_cache, expected)


@pytest.mark.parametrize("columns", ["distinct", "per_agent"])
def test_write_lr(columns: str) -> None:
    stream = LowRankStream("m", ranks=(3, 0, 3, 2), group=(0, 1, 0, 3))
    table = stream.table(columns, PAGES, PAGE)  # type: ignore[arg-type]
    cache = torch.zeros(stream.elements(columns, PAGES, PAGE))  # type: ignore[arg-type]
    lr = torch.randn(4, stream.width)
    # Agents keep different tokens: slot 0 is in the scratch page.
    slots = torch.tensor([[8, 9, 10, 39], [0, 0, 0, 0], [0, 9, 0, 39], [8, 0, 0, 38]])
    ops.write_lr(lr, cache, table, slots)
    for agent, (offset, rank, source, writes) in enumerate(table[1:].tolist()):
        if not writes:
            continue
        block = cache[offset : offset + PAGES * PAGE * rank].view(PAGES * PAGE, rank)
        expected = torch.zeros_like(block)
        for t, slot in enumerate(slots[agent].tolist()):
            expected[slot] = lr[t, source : source + rank]
        assert torch.equal(block[PAGE:], expected[PAGE:])


def test_equal_a_shares_a_block_only_in_distinct_columns() -> None:
    stream = LowRankStream("m", ranks=(3, 3), group=(0, 0))
    shared, apart = stream.table("distinct", PAGES, PAGE), stream.table("per_agent", PAGES, PAGE)
    assert shared[1, 0] == shared[2, 0] and shared[:, 3].tolist() == [0, 1, 0]
    assert apart[1, 0] != apart[2, 0] and apart[:, 3].tolist() == [0, 1, 1]
    assert (stream.width, stream.elements("distinct", 1, 1), stream.elements("per_agent", 1, 1)) == (3, 3, 6)
