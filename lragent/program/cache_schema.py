"""Layout of the KV cache of one rewritten model: tensors, bytes, LR blocks.

The passes derive a `CacheSchema` from the graph, the runtime allocates tensors from it, and the kernels read the LR
directories. Legend: P = tokens per page, H = KV heads, D = head dim, N = agents (without `base`), r = rank.

Base streams are one tensor per layer and stream, `[pages, H, P, D]`. The low-rank (LR) stream `x A` of one projection
is one flat tensor of blocks, each `[pages, P, r]`. In "per_agent" each agent with an adapter owns a block; in
"distinct" agents with equal A share one. Page `p` of a block belongs to base page `p`: one page table serves both.
Page 0 is the scratch page: writes to its slots are discarded.
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

    `index` counts attention ops in graph order.
    """

    index: int
    kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def numbers_per_token(self) -> int:
        return self.kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class LowRankStream:
    """The low-rank stream `x A` of one projection, for every agent.

    Args:
        module: FQN of the projection, for messages and manifests.
        ranks: rank per agent, 0 where the agent has no adapter on this projection; length N.
        shares_a_with: per agent, index of the first agent whose A is bit-equal here (itself if none); length N.
        held: per agent, True if the cache stores its LR values; empty: all agents. Other agents can't act.
    """

    module: str
    ranks: tuple[int, ...]
    shares_a_with: tuple[int, ...]
    held: tuple[bool, ...] = ()

    @property
    def width(self) -> int:
        """Columns of `x @ A_cat.T`, each distinct A once."""
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
        """Agents that own an LR block and write it: of agents that share a block, the first that is held."""
        owners: dict[int, int] = {}
        for agent, rank in enumerate(self.ranks):
            if rank > 0 and (not self.held or self.held[agent]):
                owners.setdefault(agent if lr_blocks == "per_agent" else self.shares_a_with[agent], agent)
        return tuple(sorted(owners.values()))

    def lr_directory(self, lr_blocks: LrBlocks, pages: int, page_size: int) -> torch.Tensor:
        """Offset of each agent's LR block in the flat tensor: int64 `[N + 1, 4]`.

        Row = agent id (0 = base, rank 0). Fields: element offset of the block, rank, first source column in
        `x @ A_cat.T`, and 1 if this agent's row writes the block.
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
        """Length of the flat tensor; at least 2, which programs are exported for."""
        return max(2, pages * page_size * sum(self.ranks[a] for a in self.block_owners(lr_blocks)))


@dataclass(frozen=True)
class CacheSchema:
    """All cache tensors of one lowered program."""

    layout: Layout
    agents: tuple[str, ...]
    base: tuple[BaseStreams, ...]
    low_rank: tuple[LowRankStream, ...]

    def holding(self, names: Collection[str]) -> CacheSchema:
        """The schema of a cache that stores LR values of these agents only."""
        held = tuple(name in names for name in self.agents)
        return replace(self, low_rank=tuple(replace(stream, held=held) for stream in self.low_rank))

    def base_numbers_per_token(self) -> int:
        return sum(layer.numbers_per_token for layer in self.base)

    def lr_numbers_per_token(self, agent: int, lr_blocks: LrBlocks) -> int:
        """Numbers per token in the LR blocks that agent (0-based, without base) owns, over all layers."""
        return sum(s.ranks[agent] for s in self.low_rank if agent in s.block_owners(lr_blocks))
