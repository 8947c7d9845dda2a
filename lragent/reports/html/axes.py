"""The frame of a chart: lines and labels of its ticks, and lines that mark a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lragent.reports.html.markup import Markup, element
from lragent.reports.html.scale import Scale

WIDTH, RIGHT = 760, 24  # of every chart, and its margin
Place = Callable[[float], float]  # value -> coordinate
LETTER = 6.8  # width of a letter, on the wide side


def figure(title: str, keys: Markup, parts: Sequence[Markup], height: float) -> Markup:
    """A chart under its title and keys; it scrolls by itself where the page is too narrow to read it."""
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    return element("figure", element("figcaption", title), keys, element("div", drawing, class_="scroll"))


def columns(scale: Scale, x: Place, top: float, bottom: float) -> list[Markup]:
    """Upright lines at the ticks, with labels under them."""
    parts = []
    for tick in scale.ticks():
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        parts.append(element("text", scale.label(tick), x=x(tick), y=bottom + 16, text_anchor="middle", class_="soft"))
    return parts


def rows(scale: Scale, y: Place, left: float, right: float) -> list[Markup]:
    """Level lines at the ticks, with labels before them."""
    parts = []
    for tick in scale.ticks():
        parts.append(element("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", scale.label(tick), x=left - 8, y=y(tick) + 4, text_anchor="end", class_="soft"))
    return parts


def upright_mark(text: str, x: float, top: float, bottom: float, left: float, right: float) -> list[Markup]:
    """A dashed upright line with its text above, kept between `left` and `right`."""
    half = LETTER * len(text) / 2
    middle = min(max(x, left + half), right - half)
    return [
        element("line", x1=x, x2=x, y1=top - 4, y2=bottom, class_="limit"),
        element("text", text, x=middle, y=top - 9, text_anchor="middle", class_="limit"),
    ]


def level_mark(text: str, y: float, left: float, right: float) -> list[Markup]:
    """A dashed level line with its text above its end."""
    return [
        element("line", x1=left, x2=right, y1=y, y2=y, class_="limit"),
        element("text", text, x=right, y=y - 5, text_anchor="end", class_="limit"),
    ]
