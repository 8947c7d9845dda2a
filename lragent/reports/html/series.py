"""Series of a chart: names, values, colours, legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lragent.reports.html.markup import Markup, element

# On a light and on a dark page. Told apart by readers with any colour vision; more series begin again.
COLOURS = (
    ("#0067b3", "#5db2f5"),
    ("#c2530a", "#f2a25c"),
    ("#0b7a57", "#4fc79c"),
    ("#a0307f", "#e58ac6"),
    ("#6b5c00", "#d3c04a"),
    ("#4b4fbf", "#a3a6f5"),
)


@dataclass(frozen=True)
class Series:
    """Values of one kind.

    Args:
        values: by name of the row or column of the chart; a place without value is left out.
        ring: True draws rings in place of dots, where a chart of dots shows something before a change.
    """

    name: str
    values: Mapping[str, float]
    ring: bool = False


def colour(number: int) -> str:
    """CSS colour of a series by its number."""
    return f"var(--series-{number % len(COLOURS)})"


def legend(series: Sequence[Series]) -> Markup:
    return keys([(one.name, one.ring) for one in series])


def keys(named: Sequence[tuple[str, bool]]) -> Markup:
    """A list of series by name; True draws the key as a ring."""
    items = [
        element("li", element("span", class_="key", style=_key(number, ring)), name)
        for number, (name, ring) in enumerate(named)
    ]
    return element("ul", *items, class_="legend")


def _key(number: int, ring: bool) -> str:
    return f"border: 2px solid {colour(number)}" if ring else f"background: {colour(number)}"
