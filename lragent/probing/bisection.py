"""Bisection over whole numbers."""

from __future__ import annotations

from collections.abc import Callable


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Finds the largest number below `high` for which a condition holds, by bisection.

    Args:
        holds: a condition that holds up to some number and never after it.
        low: a number for which it holds.
        high: a number for which it does not hold.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
