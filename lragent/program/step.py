"""Inputs of one step of a lowered program. Every program takes them in the same order.

Legend: T = packed tokens of the step, S = sequences, M = pages per sequence (padded to the longest), R = logits rows,
N = agents. Agent id 0 is `base`; agent i of the manifest has id i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lragent.program.cache_schema import CacheSchema

# Graph inputs of a lowered program: the step first, then the cache.
STEP_INPUTS = (
    "token_ids",
    "positions",
    "agent_ids",
    "logits_rows",
    "base_slots",
    "lr_slots",
    "seq_starts",
    "context_lens",
    "page_table",
)


@dataclass(frozen=True)
class StepInputs:
    """Packed tokens of all sequences of one step; all tensors int64, on the CPU (see `cuda_graphs.py`).

    Tokens of one sequence are consecutive, ordered, and end its context: token i of a sequence with q tokens and
    context length L has position L - q + i. K and V are written before attention reads them.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] index in the trajectory
    agent_ids: torch.Tensor  # [T] agent that processes the token
    logits_rows: torch.Tensor  # [R] token indices (0 to T - 1) whose logits are returned
    base_slots: torch.Tensor  # [T] page * P + offset; writes to a slot of the scratch page are discarded
    lr_slots: torch.Tensor  # [N, T] the same for each agent's LR block
    seq_starts: torch.Tensor  # [S + 1] first token of each sequence, then T
    context_lens: torch.Tensor  # [S] context length, including the tokens of this step
    page_table: torch.Tensor  # [S, M] page ids, padded with the scratch page

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The inputs in the order of `STEP_INPUTS`."""
        return tuple(getattr(self, name) for name in STEP_INPUTS)


@dataclass(frozen=True)
class CacheTensors:
    """Cache tensors in the order of `cache_input_names`; the program mutates all of them except the LR directories."""

    k_base: tuple[torch.Tensor, ...]  # per layer [pages, H, P, Dk]
    v_base: tuple[torch.Tensor, ...]  # per layer [pages, H, P, Dv]
    low_rank: tuple[torch.Tensor, ...]  # per LR stream, flat
    lr_directories: tuple[torch.Tensor, ...]  # per LR stream [N + 1, 4]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.k_base, *self.v_base, *self.low_rank, *self.lr_directories)


def cache_input_names(schema: CacheSchema) -> tuple[str, ...]:
    """Names of the cache inputs of a lowered graph, in the order of `CacheTensors.tensors`."""
    layers, streams = range(len(schema.base)), range(len(schema.low_rank))
    return (
        *(f"k_base_{i}" for i in layers),
        *(f"v_base_{i}" for i in layers),
        *(f"lr_{j}" for j in streams),
        *(f"lr_table_{j}" for j in streams),
    )


PAGE_SIZE = 32  # tokens per page

StepKind = Literal["any", "decode", "prefill"]

# A fixed size, or the name of a size that is known at run time, with an optional offset: "seqs", "seqs + 1".
Size = int | str
ELEMENTS = "elements_"  # "elements_0", "elements_1", ...: lengths of the flat LR tensors


def input_sizes(schema: CacheSchema, steps: StepKind = "any") -> dict[str, tuple[Size, ...]]:
    """Returns the shape of every graph input, in input order. Sizes known only at run time are names.

    Args:
        steps: "decode": every sequence has one token; "prefill": the step has one sequence; "any": no restriction.
    """
    seqs: dict[StepKind, tuple[Size, Size]] = {
        "any": ("seqs", "seqs + 1"),
        "decode": ("tokens", "tokens + 1"),
        "prefill": (1, 2),
    }
    sequences, bounds = seqs[steps]
    agents = len(schema.agents)
    step: dict[str, tuple[Size, ...]] = {name: ("tokens",) for name in STEP_INPUTS}
    step |= {
        "logits_rows": ("rows",),
        "lr_slots": (agents, "tokens"),
        "seq_starts": (bounds,),
        "context_lens": (sequences,),
        "page_table": (sequences, "pages_per_seq"),
    }
    base: list[tuple[Size, ...]] = [("pages", b.kv_heads, PAGE_SIZE, b.k_dim) for b in schema.base]
    base += [("pages", b.kv_heads, PAGE_SIZE, b.v_dim) for b in schema.base]
    low_rank: list[tuple[Size, ...]] = [(f"{ELEMENTS}{j}",) for j in range(len(schema.low_rank))]
    low_rank += [(agents + 1, 4) for _ in schema.low_rank]
    return {**step, **dict(zip(cache_input_names(schema), (*base, *low_rank), strict=True))}
