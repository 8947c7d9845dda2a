"""A chart with one line of dots for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lragent.reports.html.axes import LETTER, RIGHT, WIDTH, columns, figure, upright_mark
from lragent.reports.html.log_scale import LogScale
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.scale import Scale
from lragent.reports.html.series import Series, colour, legend

LEFT, ROW, BOTTOM = 110, 30, 40
APART = 4  # dots of a row's series are drawn so far above each other, so that all are seen


def dot_chart(
    title: str,
    rows: Sequence[str],
    series: Sequence[Series],
    axis: str,
    limit: float | None = None,
    scale: Scale | None = None,
    show: Callable[[float], str] = "{:.3g}".format,
    linked: bool = False,
) -> Markup:
    """Draws each row's values as dots, one colour a series.

    Args:
        title: stands above the chart.
        axis: caption of the axis, with its unit.
        limit: a value that is marked by a line; None: none.
        scale: of the axis; None: a logarithmic one that holds all values.
        show: a value as text, for the tip of its dot.
        linked: True joins the dots of a row by a line: they are one thing at two times.
    """
    values = [value for one in series for value in one.values.values()]
    scale = scale or LogScale.of(values if limit is None else [*values, limit])
    left = max(LEFT, 24 + LETTER * max(map(len, rows), default=0))
    top = 12 if limit is None else 28
    bottom = top + ROW * len(rows)
    height = bottom + BOTTOM

    def x(value: float) -> float:
        return left + scale.at(value) * (WIDTH - RIGHT - left)

    parts = columns(scale, x, top, bottom)
    parts.append(element("text", axis, x=(left + WIDTH - RIGHT) / 2, y=height - 6, text_anchor="middle", class_="soft"))
    if limit is not None:
        parts += upright_mark(f"limit {limit:g}", x(limit), top, bottom, left, WIDTH - RIGHT)
    for number, row in enumerate(rows):
        y = top + ROW * (number + 0.5)
        parts.append(element("text", row, x=left - 12, y=y + 4, text_anchor="end"))
        parts.append(element("line", x1=left, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        places = [x(one.values[row]) for one in series if row in one.values]
        if linked and len(places) > 1:
            parts.append(element("line", x1=min(places), x2=max(places), y1=y, y2=y, class_="link"))
        for place, one in enumerate(series):
            if row in one.values:
                lower = 0 if linked else APART * (place - (len(series) - 1) / 2)
                tip = element("title", f"{row}, {one.name}: {show(one.values[row])}")
                parts.append(_dot(tip, x(one.values[row]), y + lower, place, one.ring))
    return figure(title, legend(series), parts, height)


def _dot(tip: Markup, x: float, y: float, place: int, ring: bool) -> Markup:
    """A ring is wider than a dot, so that both are seen where they meet."""
    if ring:
        return element("circle", tip, cx=x, cy=y, r=7, stroke=colour(place), stroke_width=2, class_="ring")
    return element("circle", tip, cx=x, cy=y, r=5, fill=colour(place), fill_opacity=0.85)
