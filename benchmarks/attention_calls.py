"""Calls of attention over a paged cache of random numbers, for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lragent.compile.export import CPU
from lragent.kernels.attention_call import AttentionCall
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
    """Attention of one step, with and without an adapter on K; `bytes`: bytes of the cache that it reads."""

    with_keys: AttentionCall
    without_keys: AttentionCall
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
        with_keys = AttentionCall(
            query_THqDk=torch.randn(batch * tokens, heads.kv * heads.group, heads.dim).to(dtype),
            k_cache=cache[0],
            v_cache=cache[1],
            agent_ids_T=(torch.arange(batch) % AGENTS + 1).repeat_interleave(tokens),
            seq_starts=torch.arange(batch + 1) * tokens,
            context_lens_S=torch.full((batch,), context),
            page_table_SM=order.view(batch, context // PAGE),
            lr_k=columns[0],
            lr_k_table=table,
            b_k=up[0],
            lr_v=columns[1],
            lr_v_table=table,
            b_v=up[1],
            rope_cos=rope[0],
            rope_sin=rope[1],
            rope_partner=rope[2],
            norm_weight=None,
            norm_eps=0.0,
            key_is_final=True,
            sinks_Hq=None,
            scale=heads.dim**-0.5,
            window=0,
            softcap=0.0,
        )
    no_keys: dict[str, Any] = dict.fromkeys(("lr_k", "lr_k_table", "b_k", "rope_cos", "rope_sin", "rope_partner"))
    base_bytes, low_bytes = (batch * context * n * dtype.itemsize for n in (2 * heads.kv * heads.dim, rank))
    return Paged(
        with_keys=with_keys,
        without_keys=replace(with_keys, **no_keys),
        bytes_with_keys=base_bytes + 2 * low_bytes,
        bytes_without_keys=base_bytes + low_bytes,
    )
