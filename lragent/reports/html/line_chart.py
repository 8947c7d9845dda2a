"""A line chart over named columns, with a logarithmic axis for the values."""

from __future__ import annotations

from collections.abc import Sequence

from lragent.reports.html.log_scale import LogScale, tick_label
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.series import Series, colour, legend

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 24, 52


def line_chart(title: str, columns: Sequence[str], series: Sequence[Series], axis: str, limit: float | None) -> Markup:
    """Draws each series as a line with dots; a column without value interrupts it.

    Args:
        title: for readers who don't see the chart.
        axis: caption of the columns.
        limit: a value that is marked by a line; None: none.
    """
    values = [value for one in series for value in one.values.values()]
    scale = LogScale.of(values if limit is None else [*values, limit])
    width = (WIDTH - LEFT - RIGHT) / max(len(columns), 1)
    parts: list[Markup] = []

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - scale.at(value) * (HEIGHT - TOP - BOTTOM)

    for tick in scale.ticks():
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", tick_label(tick), x=LEFT - 8, y=y(tick) + 4, text_anchor="end", class_="soft"))
    if limit is not None:
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(limit), y2=y(limit), class_="limit"))
        label = f"limit {limit:g}"
        parts.append(element("text", label, x=WIDTH - RIGHT, y=y(limit) - 5, text_anchor="end", class_="limit"))
    places = {column: LEFT + width * (number + 0.5) for number, column in enumerate(columns)}
    for column, x in places.items():
        parts.append(element("text", column, x=x, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    parts.append(element("text", axis, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle", class_="soft"))
    for number, one in enumerate(series):
        path = _path([(places[c], y(one.values[c])) if c in one.values else None for c in columns])
        parts.append(element("path", d=path, fill="none", stroke=colour(number), stroke_width=2))
        for column, x in places.items():
            if column in one.values:
                tip = element("title", f"{one.name}, {column}: {one.values[column]:.3g}")
                parts.append(element("circle", tip, cx=x, cy=y(one.values[column]), r=4, fill=colour(number)))
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return element("figure", legend(series), drawing)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """The path through points; None lifts the pen."""
    path, down = "", False
    for point in points:
        if point is not None:
            path += f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}"
        down = point is not None
    return path
