"""Splits a mixed step into decode-only and single-prefill calls.

Some attention implementations have a decode graph (one token per sequence) and a prefill graph (one sequence); see
`lragent.kernels.implementations`. Consecutive decodes form one call; each prefill chunk is a call. Sequences keep their
order: a later one may belong to the same trajectory and read what an earlier one wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lragent.program.step import STEP_INPUTS, StepInputs

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class _Part:
    """Sequences `[first, last)` of a step, with tokens `[start, end)`; `decodes`: one token per sequence."""

    decodes: bool
    first: int
    last: int
    start: int
    end: int


def homogeneous_call(decode: Call, prefill: Call) -> Call:
    """Combines a decode graph and a prefill graph into one callable for any step.

    Args:
        decode, prefill: callables over all graph inputs (`STEP_INPUTS`, then the cache); they return logits
            `[R, vocab]`.

    Returns:
        A callable over the same inputs.
    """

    def call(*inputs: Tensor) -> Tensor:
        step, cache = StepInputs(*inputs[: len(STEP_INPUTS)]), inputs[len(STEP_INPUTS) :]
        rows = step.logits_rows
        logits: Tensor | None = None
        for part in _parts(step.seq_starts.tolist()):
            mine = (rows >= part.start) & (rows < part.end)
            wanted = rows[mine] - part.start
            # Graphs return at least one row; a placeholder row is dropped below.
            given = wanted if len(wanted) else torch.zeros(1, dtype=rows.dtype, device=rows.device)
            found = (decode if part.decodes else prefill)(*_cut(step, part, given).tensors(), *cache)
            if logits is None:
                logits = found.new_empty(len(rows), found.shape[1])
            logits[mine] = found[: len(wanted)]
        assert logits is not None
        return logits

    return call


def _parts(starts: list[int]) -> list[_Part]:
    parts: list[_Part] = []
    for s, (start, end) in enumerate(pairwise(starts)):
        decodes = end - start == 1
        if decodes and parts and parts[-1].decodes:
            parts[-1] = _Part(True, parts[-1].first, s + 1, parts[-1].start, end)
        else:
            parts.append(_Part(decodes, s, s + 1, start, end))
    return parts


def _cut(step: StepInputs, part: _Part, logits_rows: Tensor) -> StepInputs:
    tokens, seqs = slice(part.start, part.end), slice(part.first, part.last)
    return StepInputs(
        token_ids=step.token_ids[tokens],
        positions=step.positions[tokens],
        agent_ids=step.agent_ids[tokens],
        logits_rows=logits_rows,
        base_slots=step.base_slots[tokens],
        lr_slots=step.lr_slots[:, tokens].contiguous(),
        seq_starts=step.seq_starts[part.first : part.last + 1] - part.start,
        context_lens=step.context_lens[seqs],
        page_table=step.page_table[seqs],
    )
