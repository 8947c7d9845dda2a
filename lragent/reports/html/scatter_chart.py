"""A chart of named places on a linear axis, with a logarithmic axis for the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lragent.reports.html.log_scale import LogScale, tick_label
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.series import Series, colour, legend

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 40, 52
STEPS = (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)  # between two ticks
MOST_TICKS = 8


def scatter_chart(
    title: str, places: Mapping[str, float], series: Sequence[Series], place_axis: str, value_axis: str
) -> Markup:
    """Draws each value of each series as a dot; the dots of the first series have their names beside them.

    Args:
        title: for readers who don't see the chart.
        places: name -> place on the linear axis. The names are those of the series' values.
        place_axis, value_axis: captions.
    """
    scale = LogScale.of([value for one in series for value in one.values.values()])
    low, high = min(places.values()), max(places.values())
    step = next((step for step in STEPS if (high - low) / step <= MOST_TICKS), STEPS[-1])
    first, last = int(low // step), int(-(-high // step))
    last = max(last, first + 1)

    def x(place: float) -> float:
        return LEFT + (place / step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - scale.at(value) * (HEIGHT - TOP - BOTTOM)

    parts: list[Markup] = []
    for tick in scale.ticks():
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", tick_label(tick), x=LEFT - 8, y=y(tick) + 4, text_anchor="end", class_="soft"))
    for number in range(first, last + 1):
        at = x(number * step)
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        parts.append(element("text", f"{number * step:g}", x=at, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", place_axis, x=middle, y=HEIGHT - 8, text_anchor="middle", class_="soft"))
    parts.append(element("text", value_axis, x=LEFT, y=16, class_="soft"))
    for number, one in enumerate(series):
        for name, value in one.values.items():
            at = x(places[name])
            tip = element("title", f"{one.name}, {name}: {places[name]:.3g}, {value:.3g}")
            parts.append(element("circle", tip, cx=at, cy=y(value), r=5, fill=colour(number), fill_opacity=0.85))
            if number == 0:
                left = at > middle
                parts.append(
                    element(
                        "text",
                        name,
                        x=at - 9 if left else at + 9,
                        y=y(value) + 4,
                        text_anchor="end" if left else "start",
                        class_="soft",
                    )
                )
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return element("figure", legend(series), drawing)
