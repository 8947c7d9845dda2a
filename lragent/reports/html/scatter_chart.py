"""A chart of named places on a linear axis, with a logarithmic axis for the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lragent.reports.html.axes import RIGHT, WIDTH, columns, figure, rows
from lragent.reports.html.linear_scale import LinearScale
from lragent.reports.html.log_scale import LogScale
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.series import Series, colour, legend

HEIGHT, LEFT, TOP, BOTTOM = 420, 70, 40, 56


def scatter_chart(
    title: str, places: Mapping[str, float], series: Sequence[Series], place_axis: str, value_axis: str
) -> Markup:
    """Draws each value of each series as a dot; the dots of the first series have their names beside them.

    Args:
        title: stands above the chart.
        places: name -> place on the linear axis. The names are those of the series' values.
        place_axis, value_axis: captions.
    """
    across = LinearScale.over(min(places.values()), max(places.values()))
    up = LogScale.of(value for one in series for value in one.values.values())
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = (LEFT + right) / 2

    def x(place: float) -> float:
        return LEFT + across.at(place) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - up.at(value) * (bottom - TOP)

    parts = [*columns(across, x, TOP, bottom), *rows(up, y, LEFT, right)]
    parts.append(element("text", place_axis, x=middle, y=HEIGHT - 10, text_anchor="middle", class_="soft"))
    parts.append(element("text", value_axis, x=LEFT, y=16, class_="soft"))
    for number, one in enumerate(series):
        for name, value in one.values.items():
            at = x(places[name])
            tip = element("title", f"{one.name}, {name}: {places[name]:.3g}, {value:.3g}")
            parts.append(element("circle", tip, cx=at, cy=y(value), r=5, fill=colour(number), fill_opacity=0.85))
            if number == 0:
                shift, anchor = (-9, "end") if at > middle else (9, "start")
                parts.append(element("text", name, x=at + shift, y=y(value) + 4, text_anchor=anchor, class_="soft"))
    return figure(title, legend(series), parts, HEIGHT)
