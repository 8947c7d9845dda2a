"""New adapters for a program that runs: their weights in memory, and the agent slots that take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lragent.errors import AdapterError
from lragent.program.agent import Agent

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # module FQN -> A [r, in] and B [out, r], without scaling


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter in memory: y = base(x) + scaling * B A x on every module that it adapts.

    Args:
        matrices: module FQN -> A `[r, in]` and B `[out, r]`, of any floating dtype and device. Ranks may differ.
        scaling: one for all modules, or module FQN -> scaling.
    """

    matrices: Matrices
    scaling: float | Mapping[str, float]


# An adapter as a caller gives it: in memory, or the directory of a PEFT adapter. Matrices alone take the scaling of the
# agent's present adapter, which must be the same for all modules.
GivenAdapter = AdapterWeights | Matrices | str | Path


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that was read and fits the model.

    Args:
        agent: its name, digests and sizes.
        matrices: module FQN -> A `[r, in]` and scaling * B `[out, r]`, in the dtype of the program.
    """

    agent: Agent
    matrices: Matrices


class AdapterSlots(Protocol):
    """The agent slots of a program in memory. A slot is named by its agent id."""

    def read(self, present: Agent, given: GivenAdapter) -> ReadAdapter:
        """Reads an adapter for an agent.

        Args:
            present: the agent with its present adapter; its name, and the scaling of matrices that come without one.

        Raises:
            AdapterError: it can't be read, adapts a module that no slot adapts, or is of a kind that only `convert` can
                put into a program; names agent, module and reason.
        """
        ...

    def refusal(
        self, slot: int, adapter: ReadAdapter, live: Collection[int], others: Mapping[int, ReadAdapter]
    ) -> AdapterError | None:
        """The reason for which an adapter does not fit a slot; None if it fits.

        Args:
            live: slots whose adapters must stay as they are.
            others: adapters that are about to be put into other slots.
        """
        ...

    def write(self, adapters: Mapping[int, ReadAdapter]) -> None:
        """Puts adapters into their slots, in place. The next step runs with them."""
        ...
