"""A chart with one line of dots for each row, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence

from lragent.reports.html.log_scale import LogScale, tick_label
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.series import Series, colour, legend

WIDTH, LEFT, RIGHT = 760, 150, 24
TOP, ROW, BOTTOM = 24, 30, 40


def dot_chart(title: str, rows: Sequence[str], series: Sequence[Series], axis: str, limit: float | None) -> Markup:
    """Draws each row's values as dots, one colour a series.

    Args:
        title: for readers who don't see the chart.
        axis: caption of the axis, with its unit.
        limit: a value that is marked by a line; None: none.
    """
    values = [value for one in series for value in one.values.values()]
    scale = LogScale.of(values if limit is None else [*values, limit])
    height = TOP + ROW * len(rows) + BOTTOM
    parts: list[Markup] = []

    def x(value: float) -> float:
        return LEFT + scale.at(value) * (WIDTH - LEFT - RIGHT)

    for tick in scale.ticks():
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=TOP, y2=height - BOTTOM, class_="grid"))
        parts.append(
            element("text", tick_label(tick), x=x(tick), y=height - BOTTOM + 16, text_anchor="middle", class_="soft")
        )
    parts.append(element("text", axis, x=(LEFT + WIDTH - RIGHT) / 2, y=height - 6, text_anchor="middle", class_="soft"))
    if limit is not None:
        parts.append(element("line", x1=x(limit), x2=x(limit), y1=TOP - 4, y2=height - BOTTOM, class_="limit"))
        label = f"limit {limit:g}"
        parts.append(element("text", label, x=x(limit), y=TOP - 8, text_anchor="middle", class_="limit"))
    for number, row in enumerate(rows):
        y = TOP + ROW * (number + 0.5)
        parts.append(element("text", row, x=LEFT - 12, y=y + 4, text_anchor="end"))
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        for place, one in enumerate(series):
            if row in one.values:
                tip = element("title", f"{row}, {one.name}: {one.values[row]:.3g}")
                parts.append(
                    element("circle", tip, cx=x(one.values[row]), cy=y, r=6, fill=colour(place), fill_opacity=0.85)
                )
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    return element("figure", legend(series), drawing)
