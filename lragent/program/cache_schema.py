"""Layout of the KV cache of one rewritten model: tensors, bytes, LR blocks.

The passes derive a `CacheSchema` from the graph, the runtime allocates tensors from it, and the kernels read the LR
directories. Legend: P = tokens per page, H = KV heads, D = head dim, N = agents (without `base`), r = rank.

Base K and V of a layer are one tensor each, `[pages, H, P, D]`. The low-rank (LR) stream `x A` of a projection is one
flat tensor of blocks, each `[pages, P, r]`. With "per_agent" blocks, each agent with an adapter has its own block; with
"distinct" blocks, agents with equal A share one. Page `p` of a block belongs to base page `p`, so one page table serves
both. Page 0 is the scratch page: writes to its slots are discarded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch

Layout = Literal["split", "dense"]
LrBlocks = Literal["distinct", "per_agent"]

SCRATCH_PAGE = 0

# Fields of a row of an LR directory; row index = agent id (0 = base).
LR_OFFSET, LR_RANK, LR_SOURCE, LR_WRITES = range(4)


@dataclass(frozen=True)
class BaseStreams:
    """Base K and V of one attention layer.

    Args:
        index: number of the attention op, in graph order.
        kv_heads: number of KV heads.
        k_dim, v_dim: dimension of a K head and of a V head.
    """

    index: int
    kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Cached numbers per token, K and V together."""
        return self.kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class LowRankStream:
    """The low-rank stream `x A` of one projection, for every agent.

    Args:
        module: FQN of the projection, for messages and manifests.
        ranks: rank per agent, length N; 0 where the agent has no adapter on this projection.
        shares_a_with: per agent, index of the first agent with a bit-equal A (its own index if none); length N.
        held: per agent, True if the cache stores its LR values; empty: all agents. Other agents can't act.
    """

    module: str
    ranks: tuple[int, ...]
    shares_a_with: tuple[int, ...]
    held: tuple[bool, ...] = ()

    @property
    def width(self) -> int:
        """Number of columns of `x @ A_cat.T`, which contains each distinct A once."""
        return sum(r for a, r in enumerate(self.ranks) if self.shares_a_with[a] == a)

    def source_columns(self) -> tuple[int, ...]:
        """First column of each agent's A in `x @ A_cat.T`."""
        starts: dict[int, int] = {}
        at = 0
        for agent, rank in enumerate(self.ranks):
            if self.shares_a_with[agent] == agent:
                starts[agent] = at
                at += rank
        return tuple(starts[self.shares_a_with[a]] for a in range(len(self.ranks)))

    def block_owners(self, lr_blocks: LrBlocks) -> tuple[int, ...]:
        """Agents that own and write an LR block. The owner of a shared block is its first agent with `held` true."""
        owners: dict[int, int] = {}
        for agent, rank in enumerate(self.ranks):
            if rank > 0 and (not self.held or self.held[agent]):
                owners.setdefault(agent if lr_blocks == "per_agent" else self.shares_a_with[agent], agent)
        return tuple(sorted(owners.values()))

    def lr_directory(self, lr_blocks: LrBlocks, pages: int, page_size: int) -> torch.Tensor:
        """Builds the LR directory, int64 `[N + 1, 4]`: the location of each agent's block in the flat tensor.

        Row = agent id (0 = base, rank 0). Fields: element offset of the block, rank, first source column in
        `x @ A_cat.T`, and 1 if this agent writes the block, else 0.

        Args:
            pages: pages of the cache, including the scratch page.
            page_size: tokens per page.
        """
        offset = 0
        offsets: dict[int, int] = {}  # by agent (per_agent), or by first agent with this A (distinct)
        owners = self.block_owners(lr_blocks)
        for agent in owners:
            offsets[agent if lr_blocks == "per_agent" else self.shares_a_with[agent]] = offset
            offset += pages * page_size * self.ranks[agent]
        sources = self.source_columns()
        rows = [[0, 0, 0, 0]]
        for agent, rank in enumerate(self.ranks):
            if rank == 0 or (self.held and not self.held[agent]):
                rows.append([0, 0, 0, 0])
                continue
            block = offsets[agent if lr_blocks == "per_agent" else self.shares_a_with[agent]]
            rows.append([block, rank, sources[agent], int(agent in owners)])
        return torch.tensor(rows, dtype=torch.int64)

    def elements(self, lr_blocks: LrBlocks, pages: int, page_size: int) -> int:
        """Length of the flat tensor in elements; at least 2, the minimum that programs are exported with."""
        return max(2, pages * page_size * sum(self.ranks[a] for a in self.block_owners(lr_blocks)))


@dataclass(frozen=True)
class CacheSchema:
    """All cache tensors of one lowered program.

    Args:
        layout: "split": base K/V and LR streams; "dense": one complete K/V.
        agents: names of the N agents, without `base`.
        base: per attention layer.
        low_rank: per projection with an LR stream.
    """

    layout: Layout
    agents: tuple[str, ...]
    base: tuple[BaseStreams, ...]
    low_rank: tuple[LowRankStream, ...]

    def holding(self, names: Collection[str]) -> CacheSchema:
        """Returns the schema of a cache that stores LR values only for the agents `names`."""
        held = tuple(name in names for name in self.agents)
        return replace(self, low_rank=tuple(replace(stream, held=held) for stream in self.low_rank))

    def base_numbers_per_token(self) -> int:
        """Numbers of base K and V per token, over all layers."""
        return sum(layer.numbers_per_token for layer in self.base)

    def lr_numbers_per_token(self, agent: int, lr_blocks: LrBlocks) -> int:
        """Numbers per token in the LR blocks that an agent owns, over all layers.

        Args:
            agent: index in `agents`.
        """
        return sum(s.ranks[agent] for s in self.low_rank if agent in s.block_owners(lr_blocks))
