"""One step of a lowered program: its inputs, in the order in which every program takes them.

Legend: T = packed tokens of the step, S = sequences, M = most pages of a sequence, R = rows whose logits are wanted,
N = agents. Agent id 0 is `base`; agent i of the manifest has id i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lragent.kernels.cache_schema import CacheSchema

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
    """Packed tokens of all sequences of one step; all tensors int64, on the CPU (see `device_steps.py`).

    Tokens of one sequence are consecutive, in order, and are the last ones of its context: token i of a sequence with
    q tokens and context length L sits at position L - q + i. K and V are written before attention reads them.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] index in the trajectory
    agent_ids: torch.Tensor  # [T] who runs the token
    logits_rows: torch.Tensor  # [R] rows of T
    base_slots: torch.Tensor  # [T] page * P + offset; a slot of the scratch page: not kept
    lr_slots: torch.Tensor  # [N, T] the same for each agent's column block
    seq_starts: torch.Tensor  # [S + 1] first token of each sequence, then T
    context_lens: torch.Tensor  # [S] tokens of context, those of this step included
    page_table: torch.Tensor  # [S, M] page ids, padded with the scratch page

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in STEP_INPUTS)


@dataclass(frozen=True)
class CacheTensors:
    """Cache tensors in the order of `cache_input_names`; the program mutates all but the tables."""

    k_base: tuple[torch.Tensor, ...]  # per layer [pages, H, P, Dk]
    v_base: tuple[torch.Tensor, ...]  # per layer [pages, H, P, Dv]
    low_rank: tuple[torch.Tensor, ...]  # per LR stream, flat
    tables: tuple[torch.Tensor, ...]  # per LR stream [N + 1, 4]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.k_base, *self.v_base, *self.low_rank, *self.tables)


def cache_input_names(schema: CacheSchema) -> tuple[str, ...]:
    layers, streams = range(len(schema.base)), range(len(schema.low_rank))
    return (
        *(f"k_base_{i}" for i in layers),
        *(f"v_base_{i}" for i in layers),
        *(f"lr_{j}" for j in streams),
        *(f"lr_table_{j}" for j in streams),
    )


@dataclass(frozen=True)
class AgentFacts:
    """What the runtime must know of an agent: its name and the sha256 of its adapter weights ("": a spare slot)."""

    name: str
    digest: str

    @property
    def spare(self) -> bool:
        return not self.digest


@dataclass(frozen=True)
class Program:
    """A lowered model that the runtime can run.

    `run(step, cache)` takes a step on the CPU and a cache on the program's device. It returns float32 logits
    `[R, vocab]`, after the model's own softcap, and writes the cache.
    """

    schema: CacheSchema
    agents: tuple[AgentFacts, ...]
    max_positions: int
    vocab_size: int
    run: Callable[[StepInputs, CacheTensors], torch.Tensor]
    facts: Mapping[str, str]  # for reports: backend, attention and its fallback, device, dtype


def run_flat(
    call: Callable[..., torch.Tensor],
) -> Callable[[StepInputs, CacheTensors], torch.Tensor]:
    """Adapts a callable that takes all graph inputs positionally."""

    def run(step: StepInputs, cache: CacheTensors) -> torch.Tensor:
        return call(*step.tensors(), *cache.tensors())

    return run
