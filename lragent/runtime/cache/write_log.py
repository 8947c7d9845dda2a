"""The record of a page table: which agent processed which tokens, in order.

It is what a replay after losing pages goes by, and part of the pages' keys. Passes that only follow from it (catch-up,
adapter-free) are not written down: schemes.py derives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WriteRange:
    """Tokens `[start, end)` written by one agent (`rebase_shared`: in one turn)."""

    agent: int
    start: int
    end: int


def log_end(log: Sequence[WriteRange]) -> int:
    """Tokens that have been processed, whether or not their pages are still there."""
    return log[-1].end if log else 0


def extend_log(log: Sequence[WriteRange], agent: int, end: int, since: int) -> tuple[WriteRange, ...]:
    """The record after `agent` processed everything up to `end`.

    Args:
        since: the last run grows only if it starts here or later; 0 where turns of one agent may merge.
    """
    start = log_end(log)
    if end <= start:
        return tuple(log)
    if log and log[-1].agent == agent and (log[-1].start >= since or agent == 0):
        return (*log[:-1], WriteRange(agent, log[-1].start, end))
    return (*log, WriteRange(agent, start, end))


def cut_log(log: Sequence[WriteRange], length: int) -> tuple[WriteRange, ...]:
    """The record of the first `length` tokens."""
    return tuple(
        WriteRange(written.agent, written.start, min(written.end, length)) for written in log if written.start < length
    )


def ranges_within(log: Sequence[WriteRange], start: int, end: int) -> Iterator[tuple[WriteRange, int, int]]:
    """The parts of log inside `[start, end)`: run, first position, end."""
    for written in log:
        low, high = max(written.start, start), min(written.end, end)
        if low < high:
            yield written, low, high
