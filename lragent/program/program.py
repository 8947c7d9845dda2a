"""A lowered model that the runtime can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lragent.program.agent import Agent
from lragent.program.cache_schema import CacheSchema
from lragent.program.live_adapters import AdapterSlots
from lragent.program.step import CacheTensors, StepInputs


@dataclass(frozen=True)
class Program:
    """A lowered model that the runtime can run.

    Args:
        schema: layout of the cache that it reads and writes.
        agents: the N agents; agent id = index + 1.
        max_positions: largest number of positions of a trajectory.
        run: takes a step on the CPU and a cache on the program's device, and writes the cache. Returns float32 logits
            `[R, vocab]`, after the model's softcap.
        facts: for reports: backend, attention and its fallback, device, dtype.
        identity: gives everything by which two programs differ in their results, by name: agents and weights by their
            hashes, versions. It may read all weights.
        adapters: puts other adapters into the program in memory; None if it can't.
    """

    schema: CacheSchema
    agents: tuple[Agent, ...]
    max_positions: int
    vocab_size: int
    run: Callable[[StepInputs, CacheTensors], torch.Tensor]
    facts: Mapping[str, str]
    identity: Callable[[], Mapping[str, Any]] = dict
    adapters: AdapterSlots | None = None


def run_flat(
    call: Callable[..., torch.Tensor],
) -> Callable[[StepInputs, CacheTensors], torch.Tensor]:
    """Adapts a callable over all graph inputs (`STEP_INPUTS`, then the cache) to the signature of `Program.run`."""

    def run(step: StepInputs, cache: CacheTensors) -> torch.Tensor:
        return call(*step.tensors(), *cache.tensors())

    return run
