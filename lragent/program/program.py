"""A lowered model that the runtime can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lragent.program.agent import Agent
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import CacheTensors, StepInputs


@dataclass(frozen=True)
class Program:
    """A lowered model that the runtime can run.

    `run(step, cache)` takes a step on the CPU and a cache on the program's device. It returns float32 logits
    `[R, vocab]`, after the model's own softcap, and writes the cache.
    """

    schema: CacheSchema
    agents: tuple[Agent, ...]
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
