"""A logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEAST = 1e-5  # smaller values, and 0, are drawn here: rounding gives as much


@dataclass(frozen=True)
class LogScale:
    """Whole decades from `10 ** low` to `10 ** high`."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float]) -> LogScale:
        """The decades that hold all values."""
        logs = [math.log10(max(value, LEAST)) for value in values]
        low = math.floor(min(logs, default=-2))
        return cls(low, max(math.ceil(max(logs, default=0)), low + 1))

    def at(self, value: float) -> float:
        """Place of a value on the axis, 0 to 1."""
        place = (math.log10(max(value, LEAST)) - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def ticks(self) -> list[float]:
        return [10.0**power for power in range(self.low, self.high + 1)]

    def label(self, tick: float) -> str:
        """`0.01`, `1`, `100`; powers below 0.001 as `1e-5`; the least one, where 0 is drawn too, with a sign."""
        text = f"{tick:g}" if tick >= 1e-3 else f"1e{round(math.log10(tick))}"
        return f"≤ {text}" if tick <= LEAST else text
