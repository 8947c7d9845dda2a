"""A chart of values over the steps of a run, with a logarithmic axis for the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lragent.reports.html.axes import RIGHT, WIDTH, columns, figure, rows, upright_mark
from lragent.reports.html.line_chart import path_through
from lragent.reports.html.linear_scale import LinearScale
from lragent.reports.html.log_scale import LogScale
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.series import colour, keys

HEIGHT, LEFT, TOP, BOTTOM = 320, 70, 32, 56
MOST_DOTS = 400  # of a curve without line

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Values over steps.

    Args:
        points: (step, value), in order.
        line: True joins the dots; False draws small ones, for values that scatter.
    """

    name: str
    points: Points
    line: bool


@dataclass(frozen=True)
class Mark:
    """A step that stands out."""

    text: str
    step: float


def step_chart(title: str, curves: Sequence[Curve], last: float, mark: Mark | None = None) -> Markup:
    """Draws curves over steps 0 to `last`.

    Args:
        title: stands above the chart, with the unit of the values.
    """
    across = LinearScale.over(0, last)
    drawn = [curve if curve.line else Curve(curve.name, thinned(curve.points), False) for curve in curves]
    up = LogScale.of(value for curve in drawn for _, value in curve.points)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def x(step: float) -> float:
        return LEFT + across.at(step) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - up.at(value) * (bottom - TOP)

    parts = [*columns(across, x, TOP, bottom), *rows(up, y, LEFT, right)]
    if mark is not None:
        parts += upright_mark(mark.text, x(mark.step), TOP, bottom, LEFT, right)
    parts.append(element("text", "steps", x=(LEFT + right) / 2, y=HEIGHT - 10, text_anchor="middle", class_="soft"))
    for number, curve in enumerate(drawn):
        places = [(x(step), y(value)) for step, value in curve.points]
        if not curve.line:
            parts += [element("circle", cx=a, cy=b, r=2.5, fill=colour(number), fill_opacity=0.6) for a, b in places]
            continue
        parts.append(element("path", d=path_through(places), fill="none", stroke=colour(number), stroke_width=2))
        for (step, value), (a, b) in zip(curve.points, places, strict=True):
            tip = element("title", f"{curve.name}, step {step:g}: {value:.3g}")
            parts.append(element("circle", tip, cx=a, cy=b, r=4.5, fill=colour(number)))
    return figure(title, keys([(curve.name, False) for curve in curves]), parts, HEIGHT)


def thinned(points: Points) -> Points:
    """At most `MOST_DOTS` points; each is the mean of as many neighbours as that takes."""
    size = -(-len(points) // MOST_DOTS)
    if size <= 1:
        return points
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]
