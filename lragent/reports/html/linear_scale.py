"""A linear axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_TICKS = 7


@dataclass(frozen=True)
class LinearScale:
    """From `first` to `last` times `step`.

    Args:
        percent: True labels shares as percentages.
    """

    first: int
    last: int
    step: float
    percent: bool = False

    @classmethod
    def over(cls, low: float, high: float, percent: bool = False) -> LinearScale:
        """The multiples of a round step, 1, 2 or 5 times a power of ten, that hold both ends."""
        high = high if high > low else low + 1.0
        span = high - low
        power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
        step = next(times * power for times in (1, 2, 5, 10) if span / (times * power) <= MOST_TICKS)
        first = math.floor(low / step + 1e-9)
        return cls(first, max(math.ceil(high / step - 1e-9), first + 1), step, percent)

    def at(self, value: float) -> float:
        """Place of a value on the axis, 0 to 1."""
        return min(1.0, max(0.0, (value / self.step - self.first) / (self.last - self.first)))

    def ticks(self) -> list[float]:
        return [number * self.step for number in range(self.first, self.last + 1)]

    def label(self, tick: float) -> str:
        """`40` or `40%`, without the error of a sum of steps."""
        return f"{100 * tick:.4g}%" if self.percent else f"{tick:.6g}"
