"""Cache memory: bytes per page, pages that fit, the cache tensors, and copies of pages.

Legend: P = tokens per page, N = agents. An LR block has the agent id of its owner (row of the LR directory); base is
agent 0 and has no block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lragent.errors import CacheMemoryError, InternalError, RequestError
from lragent.program.cache_schema import LR_WRITES, CacheSchema, LrBlocks
from lragent.program.step import CacheTensors
from lragent.runtime.cache import huge_pages

_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {**_DECIMAL, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(amount: int | str, called: str = "kv_memory") -> int:
    """Bytes of `"2GiB"`, `"1.5 GB"` or a plain number; `called` is the option's name in errors.

    Raises:
        RequestError: not a number with a known unit.
    """
    if isinstance(amount, int):
        return amount
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", amount)
    if match is None or match[2].upper() not in _UNITS:
        raise RequestError(
            f"{called} {amount!r} is not an amount of memory", 'Write it like "2GiB", "512MB" or 1048576.'
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class PageBytes:
    """Bytes of one page, over all layers."""

    base: int
    low_rank: tuple[int, ...]  # [N + 1] by agent id, the LR block that this agent owns

    @property
    def total(self) -> int:
        return self.base + sum(self.low_rank)


def page_bytes(schema: CacheSchema, lr_blocks: LrBlocks, page_size: int, dtype: torch.dtype) -> PageBytes:
    scale = page_size * dtype.itemsize
    blocks = (schema.lr_numbers_per_token(agent, lr_blocks) for agent in range(len(schema.agents)))
    return PageBytes(schema.base_numbers_per_token() * scale, (0, *(numbers * scale for numbers in blocks)))


def pages_that_fit(kv_memory: int | str, page: PageBytes) -> int:
    """Number of pages in `kv_memory`, the scratch page included.

    Raises:
        CacheMemoryError: fewer than two pages, since one is the scratch page.
    """
    pages = parse_bytes(kv_memory) // page.total
    if pages < 2:
        raise CacheMemoryError(
            f"kv_memory {kv_memory} holds {pages} pages of {page.total} bytes, at least 2 are needed",
            "Give more memory or a smaller page_size.",
        )
    return pages


@dataclass(frozen=True)
class CacheMemory:
    """The cache tensors and their layout, for copies of pages."""

    tensors: CacheTensors
    schema: CacheSchema
    lr_blocks: LrBlocks
    pages: int
    page_size: int

    def read_block(self, slot: int, block: int) -> None:
        """Makes an agent id without an LR block read that of another one; both have equal ranks in every stream."""
        for stream, directory in zip(self.schema.low_rank, self.tensors.lr_directories, strict=True):
            row = stream.lr_directory(self.lr_blocks, self.pages, self.page_size)[block]
            row[LR_WRITES] = 0
            directory[slot].copy_(row)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole pages, base and all LR blocks. A page may be a source and a target."""
        if not sources:
            return
        device = self.tensors.k_base[0].device
        source, target = torch.tensor([sources, targets], device=device)
        for tensor in (*self.tensors.k_base, *self.tensors.v_base):
            tensor.index_copy_(0, target, tensor.index_select(0, source))
        for stream, flat in zip(self.schema.low_rank, self.tensors.low_rank, strict=True):
            offset = 0
            for agent in stream.block_owners(self.lr_blocks):
                size = self.pages * self.page_size * stream.ranks[agent]
                block = flat[offset : offset + size].view(self.pages, -1)
                block.index_copy_(0, target, block.index_select(0, source))
                offset += size


def allocate(
    schema: CacheSchema, lr_blocks: LrBlocks, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> CacheMemory:
    """All cache tensors, zeroed. On a CPU the system commits memory when it is first written.

    Raises:
        CacheMemoryError: the system refuses that much memory.
    """
    if schema.layout == "dense" and schema.low_rank:
        raise InternalError("a dense cache schema must not name low-rank streams")

    layers = schema.base
    shapes = [
        *((pages, layer.kv_heads, page_size, layer.k_dim) for layer in layers),
        *((pages, layer.kv_heads, page_size, layer.v_dim) for layer in layers),
        *((stream.elements(lr_blocks, pages, page_size),) for stream in schema.low_rank),
    ]
    try:
        if device.type == "cpu":
            held = huge_pages.zeros(shapes, dtype)
        else:
            held = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        tensors = CacheTensors(
            k_base=tuple(held[: len(layers)]),
            v_base=tuple(held[len(layers) : 2 * len(layers)]),
            low_rank=tuple(held[2 * len(layers) :]),
            lr_directories=tuple(
                stream.lr_directory(lr_blocks, pages, page_size).to(device) for stream in schema.low_rank
            ),
        )
    except (OSError, RuntimeError) as error:  # mmap, PyTorch
        size = page_bytes(schema, lr_blocks, page_size, dtype).total * pages
        raise CacheMemoryError(f"{size} bytes of cache can't be allocated: {error}", "Give less kv_memory.") from error
    return CacheMemory(tensors, schema, lr_blocks, pages, page_size)
