"""Arguments of the attention op over a paged cache of random numbers, for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.compile.export import CPU
from lragent.program.cache_schema import LowRankStream
from lragent.runtime.cache import huge_pages

PAGE = 32
AGENTS = 3


@dataclass(frozen=True)
class Heads:
    """KV heads, query heads per KV head, and channels per head."""

    kv: int
    group: int
    dim: int


@dataclass(frozen=True)
class Paged:
    """Arguments of the attention op for one step; `bytes`: bytes of the cache that it reads."""

    with_keys: tuple[object, ...]
    without_keys: tuple[object, ...]
    bytes_with_keys: int
    bytes_without_keys: int


def held(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of CPU tensors in huge pages, like the engine's caches; tensors of a GPU as they are."""
    if tensors[0].is_cuda:
        return tensors
    found = huge_pages.zeros([t.shape for t in tensors], tensors[0].dtype)
    return [to.copy_(t) for to, t in zip(found, tensors, strict=True)]


def rotation(positions: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos and sin `[positions, dim]` and each channel's partner, for channel pairs (d, d + dim / 2)."""
    half = dim // 2
    angles = torch.outer(torch.arange(float(positions)), 1e-4 ** (torch.arange(half) / half)).repeat(1, 2)
    signs = torch.cat([-torch.ones(half), torch.ones(half)])
    return angles.cos(), angles.sin() * signs, torch.arange(dim).roll(half)


def paged(
    batch: int,
    context: int,
    rank: int,
    dtype: torch.dtype,
    heads: Heads,
    tokens: int = 1,
    device: torch.device = CPU,
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> Paged:
    """`batch` sequences with `tokens` new tokens at the end of `context`; agents take turns over sequences.

    `rope`: tables shared with other calls, as by the layers of a model; None: tables of this call alone.
    """
    pages = 1 + batch * (context // PAGE)
    stream = LowRankStream("", (rank,) * AGENTS, tuple(range(AGENTS)))
    with device:
        order = 1 + torch.randperm(pages - 1)
        table = stream.lr_directory("per_agent", pages, PAGE).to(order.device)
        base = [torch.randn(pages, heads.kv, PAGE, heads.dim).to(dtype) for _ in range(2)]
        low = [torch.randn(stream.elements("per_agent", pages, PAGE)).to(dtype) for _ in range(2)]
        memory = held([*base, *low])
        cache, columns = memory[:2], memory[2:]
        up = [torch.randn(AGENTS + 1, heads.kv, rank, heads.dim).to(dtype) for _ in range(2)]
        rope = rope or rotation(context, heads.dim)
        step = (
            torch.randn(batch * tokens, heads.kv * heads.group, heads.dim).to(dtype),
            *cache,
            (torch.arange(batch) % AGENTS + 1).repeat_interleave(tokens),
            torch.arange(batch + 1) * tokens,
            torch.full((batch,), context),
            order.view(batch, context // PAGE),
        )
    rest = (None, 0.0, True, None, heads.dim**-0.5, 0, 0.0)
    keys, values = (columns[0], table, up[0]), (columns[1], table, up[1])
    base_bytes, low_bytes = (batch * context * n * dtype.itemsize for n in (2 * heads.kv * heads.dim, rank))
    return Paged(
        with_keys=(*step, *keys, *values, *rope, *rest),
        without_keys=(*step, None, None, None, *values, None, None, None, *rest),
        bytes_with_keys=base_bytes + 2 * low_bytes,
        bytes_without_keys=base_bytes + low_bytes,
    )
