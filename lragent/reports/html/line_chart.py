"""A line chart over named columns, with a logarithmic axis for the values."""

from __future__ import annotations

from collections.abc import Sequence

from lragent.reports.html.axes import RIGHT, WIDTH, figure, level_mark, rows
from lragent.reports.html.log_scale import LogScale
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.series import Series, colour, legend

HEIGHT, LEFT, TOP, BOTTOM = 280, 70, 24, 52
APART = 7  # dots of a column's series are drawn so far beside each other, so that all are seen


def line_chart(title: str, columns: Sequence[str], series: Sequence[Series], axis: str, limit: float | None) -> Markup:
    """Draws each series as a line with dots; a column without value interrupts it.

    Args:
        title: stands above the chart, with the unit of the values.
        axis: caption of the columns.
        limit: a value that is marked by a line; None: none.
    """
    values = [value for one in series for value in one.values.values()]
    scale = LogScale.of(values if limit is None else [*values, limit])
    width = (WIDTH - LEFT - RIGHT) / max(len(columns), 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - scale.at(value) * (HEIGHT - TOP - BOTTOM)

    parts = rows(scale, y, LEFT, WIDTH - RIGHT)
    if limit is not None:
        parts += level_mark(f"limit {limit:g}", y(limit), LEFT, WIDTH - RIGHT)
    places = {column: LEFT + width * (number + 0.5) for number, column in enumerate(columns)}
    for column, x in places.items():
        parts.append(element("text", column, x=x, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    parts.append(element("text", axis, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle", class_="soft"))
    for number, one in enumerate(series):
        beside = APART * (number - (len(series) - 1) / 2)
        path = path_through([(places[c] + beside, y(one.values[c])) if c in one.values else None for c in columns])
        parts.append(element("path", d=path, fill="none", stroke=colour(number), stroke_width=2))
        for column, x in places.items():
            if column in one.values:
                tip = element("title", f"{one.name}, {column}: {one.values[column]:.3g}")
                parts.append(element("circle", tip, cx=x + beside, cy=y(one.values[column]), r=4, fill=colour(number)))
    return figure(title, legend(series), parts, HEIGHT)


def path_through(points: Sequence[tuple[float, float] | None]) -> str:
    """The path through points; None lifts the pen."""
    path, down = "", False
    for point in points:
        if point is not None:
            path += f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}"
        down = point is not None
    return path
