"""Cache memory on the CPU."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from lragent.runtime.cache import huge_pages


@pytest.mark.parametrize("shape", [(3,), (1 << 19,), (5, 3, 70_001), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeroed_writable_and_of_the_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for tensor in huge_pages.zeros([shape, (7,), shape], dtype)[::2]:
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(2)
        assert bool((tensor == 2).all())


def test_tensors_do_not_overlap_and_begin_a_cache_line() -> None:
    tensors = huge_pages.zeros([(5,), (3, 333_333), (1,), (1 << 20,)], torch.bfloat16)
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    assert [bool((t == i + 1).all()) for i, t in enumerate(tensors)] == [True] * 4
    assert not any(t.data_ptr() % 64 for t in tensors)


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    view = huge_pages.zeros([(4,), (1 << 20,)], torch.float32)[1][-3:]
    gc.collect()
    view.fill_(1)
    assert view.sum() == 3


def test_memory_is_committed_when_written() -> None:
    before = _resident_pages()
    (tensor,) = huge_pages.zeros([(1 << 31,)], torch.bfloat16)
    tensor[-1] = 1
    assert (_resident_pages() - before) * mmap.PAGESIZE < 1 << 28


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
