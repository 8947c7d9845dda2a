"""Formats places where passes did not match as lines of text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lragent.errors import Miss


def miss_lines(misses: Mapping[str, Sequence[Miss]]) -> list[str]:
    """One line for each layout and reason, with every place and its node."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layout, found in misses.items():
        for miss in found:
            places[layout, miss.reason].append(f"{miss.where} (node {miss.node})")
    return [f"not matched, {layout}: {reason}: {', '.join(where)}" for (layout, reason), where in places.items()]
