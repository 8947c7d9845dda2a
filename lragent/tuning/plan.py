"""Plans a round: how many steps fit into its time. The plan is in the checkpoint, so a resumed round keeps it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lragent.tuning.batches import Batch
from lragent.tuning.options import TuneOptions

MARGIN = 0.95  # of the time that is left is planned for
OVERTIME = 1.15  # steps may take this much longer than planned before the round ends


@dataclass(frozen=True)
class Plan:
    """The plan of a round.

    Args:
        steps: planned optimizer steps.
        seconds_a_step: estimate, evaluations included.
        seconds_allowed: time of all steps after which the round ends early.
    """

    steps: int
    seconds_a_step: float
    seconds_allowed: float


def batch_to_time(batches: Sequence[Batch]) -> Batch:
    """The batch that `plan_round` times: the one with the fewest tokens."""
    return min(batches, key=_tokens)


def plan_round(
    options: TuneOptions,
    batches: Sequence[Batch],
    trial: Callable[[Batch], object],
    device: torch.device,
    seconds_of_teacher: Sequence[float],
    seconds_of_report: float,
    seconds_used: float,
) -> Plan:
    """Times one step that changes nothing, and plans as many as fit.

    Args:
        trial: forward and backward of a batch.
        seconds_of_teacher: for each batch, time of the teacher's forward of examples that no batch before has.
        seconds_of_report: time of a report; an evaluation takes at most as long.
        seconds_used: time of the round so far.
    """
    first = batch_to_time(batches)
    trial(first)  # the first call is slower than those that follow
    seconds = seconds_of(lambda: trial(first), device)
    a_step = seconds / _tokens(first) * sum(map(_tokens, batches)) / len(batches)
    left = options.minutes * 60 * MARGIN - seconds_used - 2 * seconds - seconds_of_report
    evaluations = (options.evaluations + 1) * seconds_of_report
    ends = list(accumulate(a_step + teacher for teacher in seconds_of_teacher))
    steps = max(1, sum(end <= left - evaluations for end in ends))
    with_evaluations = a_step + evaluations / steps
    left -= sum(seconds_of_teacher[:steps])
    return Plan(steps, with_evaluations, max(with_evaluations * steps * OVERTIME, left))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of work, launched kernels included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _tokens(batch: Batch) -> int:
    return sum(example.tokens for example in batch.examples)
