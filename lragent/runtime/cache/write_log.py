"""The write log of a page table: the agent that wrote each range of tokens, in order of position.

A replay after lost pages follows the log, and page keys depend on it. Catch-up and adapter-free forwards are not
logged: schemes.py derives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WriteRange:
    """Tokens `[start, end)` that one agent wrote (in `rebase_shared`: in one turn)."""

    agent: int
    start: int
    end: int


def log_end(log: Sequence[WriteRange]) -> int:
    """Processed tokens, including those whose pages were lost."""
    return log[-1].end if log else 0


def extend_log(log: Sequence[WriteRange], agent: int, end: int, since: int) -> tuple[WriteRange, ...]:
    """The log after `agent` wrote all tokens up to `end`.

    Args:
        since: the last range is extended only if it starts here or later; 0 if turns of one agent may merge.
    """
    start = log_end(log)
    if end <= start:
        return tuple(log)
    if log and log[-1].agent == agent and (log[-1].start >= since or agent == 0):
        return (*log[:-1], WriteRange(agent, log[-1].start, end))
    return (*log, WriteRange(agent, start, end))


def cut_log(log: Sequence[WriteRange], length: int) -> tuple[WriteRange, ...]:
    """The log of the first `length` tokens."""
    return tuple(
        WriteRange(written.agent, written.start, min(written.end, length)) for written in log if written.start < length
    )


def ranges_within(log: Sequence[WriteRange], start: int, end: int) -> Iterator[tuple[WriteRange, int, int]]:
    """The parts of ranges inside `[start, end)`: the range, first position, end."""
    for written in log:
        low, high = max(written.start, start), min(written.end, end)
        if low < high:
            yield written, low, high
