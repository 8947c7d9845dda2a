"""The scale of an axis: places of values, ticks and their labels."""

from __future__ import annotations

from typing import Protocol


class Scale(Protocol):
    """Maps values to places on an axis, 0 at its beginning and 1 at its end."""

    def at(self, value: float) -> float: ...

    def ticks(self) -> list[float]: ...

    def label(self, tick: float) -> str: ...
