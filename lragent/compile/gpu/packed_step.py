"""Packs the inputs of a step into one buffer, so that one copy moves them to a GPU, and pads them to few sizes.

Legend as in `program/step.py`: T = packed tokens, S = sequences, M = pages per sequence, R = logits rows, N = agents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lragent.program.step import STEP_INPUTS, StepInputs

# Inputs start at multiples of this many int64 numbers: kernels may require 16-byte alignment.
ALIGNMENT = 2
LEAST_PAGES_PER_SEQ = 8


@dataclass(frozen=True)
class StepSizes:
    """The sizes that determine the shapes of a step's inputs."""

    tokens: int
    sequences: int
    pages_per_seq: int
    rows: int
    agents: int

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs, in the order of `STEP_INPUTS`."""
        shapes = {
            "logits_rows": (self.rows,),
            "lr_slots": (self.agents, self.tokens),
            "seq_starts": (self.sequences + 1,),
            "context_lens": (self.sequences,),
            "page_table": (self.sequences, self.pages_per_seq),
        }
        return tuple(shapes.get(name, (self.tokens,)) for name in STEP_INPUTS)

    def numbers(self) -> int:
        """Length of the buffer that holds all inputs, in int64 numbers, alignment included."""
        return sum(_aligned(math.prod(shape)) for shape in self.shapes())


def sizes_of(step: StepInputs) -> StepSizes:
    """The sizes of a step's inputs."""
    agents, tokens = step.lr_slots.shape
    sequences, pages_per_seq = step.page_table.shape
    return StepSizes(tokens, sequences, pages_per_seq, step.logits_rows.numel(), agents)


def padded(sizes: StepSizes) -> StepSizes:
    """Rounds sizes up to few values: at most a quarter larger; `pages_per_seq` to a power of two, at least 8."""
    decodes = sizes.tokens == sizes.sequences
    sequences = rounded_up(sizes.sequences)
    return replace(
        sizes,
        sequences=sequences,
        # A decode-only step stays decode-only: attention recognizes it by tokens == sequences.
        tokens=sequences if decodes else max(rounded_up(sizes.tokens), sequences + 1),
        rows=max(rounded_up(sizes.rows), sequences),
        pages_per_seq=max(LEAST_PAGES_PER_SEQ, 1 << (sizes.pages_per_seq - 1).bit_length()),
    )


def rounded_up(count: int) -> int:
    """The smallest number >= `count` with at most three significant bits."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def views(buffer: Tensor, sizes: StepSizes) -> tuple[Tensor, ...]:
    """Views of a flat buffer as the inputs of a step of these sizes, in the order of `STEP_INPUTS`."""
    parts: list[Tensor] = []
    start = 0
    for shape in sizes.shapes():
        count = math.prod(shape)
        parts.append(buffer[start : start + count].view(shape))
        start += _aligned(count)
    return tuple(parts)


def pack(step: StepInputs, buffer: Tensor, sizes: StepSizes) -> None:
    """Writes a step into the first `sizes.numbers()` elements of a flat CPU buffer, padded to `sizes`.

    Padding tokens belong to no sequence and write to the scratch page. Padding sequences have no tokens. Padding
    logits rows repeat token 0.
    """
    buffer[: sizes.numbers()] = 0
    for name, part, target in zip(STEP_INPUTS, step.tensors(), views(buffer, sizes), strict=True):
        if name == "seq_starts":
            target.fill_(step.token_ids.numel())
        _corner(target, part.shape).copy_(part)


def _corner(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def buffer_for(numbers: int, device: torch.device) -> Tensor:
    """Allocates an int64 buffer; CPU memory is pinned if a GPU is present, so that copies can be asynchronous."""
    pinned = device.type == "cpu" and torch.cuda.is_available()
    return torch.empty(numbers, dtype=torch.int64, device=device, pin_memory=pinned)
