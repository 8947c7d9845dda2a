"""largest: the last number that a condition holds for, found in few questions."""

from __future__ import annotations

import pytest

from lragent.probing.bisection import largest


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 4), (3, 100), (0, 1 << 16)])
def test_every_place_is_found(low: int, high: int) -> None:
    for last in {low, (low + high) // 2, high - 1}:
        asked: list[int] = []

        def holds(number: int, last: int = last, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number <= last

        assert largest(holds, low, high) == last
        assert len(asked) <= (high - low).bit_length() and all(low < number < high for number in asked)
