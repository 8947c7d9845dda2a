"""The inputs of a step side by side in one buffer, so that a GPU gets them in one copy; and padded to fewer sizes.

Legend as in `program/step.py`: T = packed tokens, S = sequences, M = page table columns, R = logits rows, N = agents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lragent.program.step import STEP_INPUTS, StepInputs

# Numbers (int64) that an input starts at a multiple of: kernels may count on addresses of 16 bytes.
ALIGNMENT = 2
LEAST_COLUMNS = 8


@dataclass(frozen=True)
class StepSizes:
    """What the shapes of a step's inputs follow from."""

    tokens: int
    sequences: int
    columns: int
    rows: int
    agents: int

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs, in the order of `STEP_INPUTS`."""
        of = {
            "logits_rows": (self.rows,),
            "lr_slots": (self.agents, self.tokens),
            "seq_starts": (self.sequences + 1,),
            "context_lens": (self.sequences,),
            "page_table": (self.sequences, self.columns),
        }
        return tuple(of.get(name, (self.tokens,)) for name in STEP_INPUTS)

    def numbers(self) -> int:
        """Numbers of all inputs, each aligned."""
        return sum(_aligned(math.prod(shape)) for shape in self.shapes())


def sizes_of(step: StepInputs) -> StepSizes:
    agents, tokens = step.lr_slots.shape
    sequences, columns = step.page_table.shape
    return StepSizes(tokens, sequences, columns, step.logits_rows.numel(), agents)


def padded(sizes: StepSizes) -> StepSizes:
    """Sizes at most a quarter larger (columns: up to twice), of which there are few."""
    decodes = sizes.tokens == sizes.sequences
    sequences = rounded_up(sizes.sequences)
    return replace(
        sizes,
        sequences=sequences,
        # A step of decodes stays one: that is how attention knows it.
        tokens=sequences if decodes else max(rounded_up(sizes.tokens), sequences + 1),
        rows=max(rounded_up(sizes.rows), sequences),
        columns=max(LEAST_COLUMNS, 1 << (sizes.columns - 1).bit_length()),
    )


def rounded_up(count: int) -> int:
    """The least number that isn't below `count` and has at most three significant bits."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def views(buffer: Tensor, sizes: StepSizes) -> tuple[Tensor, ...]:
    """A step's inputs of these sizes in a flat buffer, in the order of `STEP_INPUTS`."""
    parts: list[Tensor] = []
    start = 0
    for shape in sizes.shapes():
        count = math.prod(shape)
        parts.append(buffer[start : start + count].view(shape))
        start += _aligned(count)
    return tuple(parts)


def pack(step: StepInputs, buffer: Tensor, sizes: StepSizes) -> None:
    """Writes a step into the front of a flat buffer on the CPU, padded to `sizes`.

    Padding tokens belong to no sequence and write into the scratch page; padding sequences have no tokens; padding
    rows of logits are those of token 0.
    """
    buffer[: sizes.numbers()] = 0
    for name, part, there in zip(STEP_INPUTS, step.tensors(), views(buffer, sizes), strict=True):
        if name == "seq_starts":
            there.fill_(step.token_ids.numel())
        _corner(there, part.shape).copy_(part)


def _corner(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def buffer_for(numbers: int, device: torch.device) -> Tensor:
    """An empty buffer; on the CPU in memory that a GPU copies from by itself, if there is a GPU."""
    pinned = device.type == "cpu" and torch.cuda.is_available()
    return torch.empty(numbers, dtype=torch.int64, device=device, pin_memory=pinned)
