"""Where a condition on whole numbers stops holding."""

from __future__ import annotations

from collections.abc import Callable


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number below `high` for which a condition holds that holds at `low` and not at `high`.

    It is asked about as many numbers as the distance has bits, so it must stop holding once only.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
