"""The record of a page table: which agent processed which tokens, in order.

It is what a replay after losing pages goes by, and part of the pages' keys. Passes that only follow from it (catch-up,
adapter-free) are not written down: schemes.py derives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Tokens `[start, end)` written by one agent (`rebase_shared`: in one turn)."""

    agent: int
    start: int
    end: int


def extent(runs: Sequence[Run]) -> int:
    """Tokens that have been processed, whether or not their pages are still there."""
    return runs[-1].end if runs else 0


def extended(runs: Sequence[Run], agent: int, end: int, since: int) -> tuple[Run, ...]:
    """The record after `agent` processed everything up to `end`.

    Args:
        since: the last run grows only if it starts here or later; 0 where turns of one agent may merge.
    """
    start = extent(runs)
    if end <= start:
        return tuple(runs)
    if runs and runs[-1].agent == agent and (runs[-1].start >= since or agent == 0):
        return (*runs[:-1], Run(agent, runs[-1].start, end))
    return (*runs, Run(agent, start, end))


def cut(runs: Sequence[Run], length: int) -> tuple[Run, ...]:
    """The record of the first `length` tokens."""
    return tuple(Run(run.agent, run.start, min(run.end, length)) for run in runs if run.start < length)


def pieces(runs: Sequence[Run], start: int, end: int) -> Iterator[tuple[Run, int, int]]:
    """The parts of runs inside `[start, end)`: run, first position, end."""
    for run in runs:
        low, high = max(run.start, start), min(run.end, end)
        if low < high:
            yield run, low, high
