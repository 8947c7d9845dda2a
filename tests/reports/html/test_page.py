"""Pages need no other file, and text in them stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lragent.reports.html.dot_chart import dot_chart
from lragent.reports.html.line_chart import line_chart
from lragent.reports.html.linear_scale import MOST_TICKS, LinearScale
from lragent.reports.html.log_scale import LogScale
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.page import Section, bullets, code, page, paragraph, verdict
from lragent.reports.html.scatter_chart import scatter_chart
from lragent.reports.html.series import COLOURS, Series
from lragent.reports.html.step_chart import MOST_DOTS, Curve, Mark, step_chart, thinned
from lragent.reports.html.table import table

NASTY = "<script>alert(\"1\")</script> & 'x'"
VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Checks that every element ends, and collects texts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(source: str) -> Balanced:
    parser = Balanced()
    parser.feed(source)
    parser.close()
    assert parser.open == []
    return parser


def require_self_contained(source: str) -> Balanced:
    """Nothing is loaded and nothing is run."""
    found = parsed(source)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"}
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "srcset", "xlink:href"} and not any(name.startswith("on") for name in names)
    assert not re.search(r"https?://|url\(|@import", source)
    return found


SERIES = [Series(NASTY, {"a": 0.01, NASTY: 0.3}), Series("two", {"a": 0.0})]


def test_a_whole_page_is_self_contained_and_its_text_is_escaped() -> None:
    charts = (
        dot_chart(NASTY, ["a", NASTY], SERIES, NASTY, 0.05),
        line_chart(NASTY, ["a", NASTY], SERIES, NASTY, 0.05),
        step_chart(NASTY, [Curve(NASTY, [(0, 0.3), (1, 0.1)], line=True)], 2, Mark(NASTY, 1)),
        scatter_chart(NASTY, {"a": 1.0, NASTY: 2.5}, SERIES, NASTY, NASTY),
    )
    texts = (paragraph(NASTY), verdict(NASTY), bullets([NASTY]), code([NASTY]))
    parts = (*charts, table([NASTY, "b"], [[NASTY, "1"]], NASTY, [0]), *texts)
    source = page(NASTY, NASTY, [Section(NASTY, parts)])
    found = require_self_contained(source)
    assert NASTY in found.texts and source.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in source
    assert source.count("--series-0:") == 2  # light and dark
    assert {"svg", "table", "figure", "title"} <= found.tags


@pytest.mark.parametrize("chart", [dot_chart, line_chart])
def test_charts_draw_what_there_is(chart: object) -> None:
    drawn = chart("title", ["a", "b"], [Series("s", {"a": 0.01})], "axis", None)  # type: ignore[operator]
    assert drawn.source.count("<circle") == 1 and "limit" not in drawn.source
    assert "NaN" not in drawn.source and "inf" not in drawn.source
    empty = chart("title", [], [], "axis", None)  # type: ignore[operator]
    assert "<circle" not in parsed(empty.source).tags


def test_a_missing_value_interrupts_a_line() -> None:
    drawn = line_chart("t", ["a", "b", "c", "d"], [Series("s", {"a": 1.0, "b": 1.0, "d": 1.0})], "x", None)
    (path,) = re.findall(r'<path d="([^"]*)"', drawn.source)
    assert re.sub(r"[\d. ]+", "", path) == "MLM"


def test_log_scale_holds_all_values_in_whole_decades() -> None:
    scale = LogScale.of([0.003, 0.05, 0.2])
    assert (scale.low, scale.high) == (-3, 0) and scale.ticks() == [0.001, 0.01, 0.1, 1.0]
    assert scale.at(0.001) == 0.0 and scale.at(1.0) == 1.0 and scale.at(0.01) == pytest.approx(1 / 3)
    assert LogScale.of([0.0]).at(0.0) == 0.0
    assert LogScale.of([]).high > LogScale.of([]).low
    labels = [scale.label(value) for value in (1e-5, 1e-4, 0.001, 1.0, 100.0)]
    assert labels == ["≤ 1e-5", "1e-4", "0.001", "1", "100"]  # 0 is drawn at the least value


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (0, 13, ["0", "2", "4", "6", "8", "10", "12", "14"]),
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0, 0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (3, 99_000, ["0", "20000", "40000", "60000", "80000", "100000"]),
    ],
)
def test_linear_scale_has_round_ticks_that_hold_both_ends(low: float, high: float, ticks: list[str]) -> None:
    scale = LinearScale.over(low, high)
    assert [scale.label(tick) for tick in scale.ticks()] == ticks
    assert len(ticks) <= MOST_TICKS + 1
    assert scale.at(scale.ticks()[0]) == 0.0 and scale.at(scale.ticks()[-1]) == 1.0
    assert 0 <= scale.at(low) <= scale.at(high) <= 1


def test_shares_are_shown_in_percent() -> None:
    scale = LinearScale.over(0.801, 1.0, percent=True)
    assert [scale.label(tick) for tick in scale.ticks()] == ["80%", "85%", "90%", "95%", "100%"]
    assert scale.at(0.85) == pytest.approx(0.25)


def places(source: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<circle[^>]* {name}="([\d.]+)"', source)]


def test_dots_before_and_after_are_both_seen_where_they_meet() -> None:
    series = [Series("before", {"a": 0.8, "b": 1.0}, ring=True), Series("after", {"a": 1.0, "b": 1.0})]
    scale = LinearScale.over(0.8, 1.0, percent=True)
    drawn = dot_chart("t", ["a", "b"], series, "share", None, scale, "{:.0%}".format, linked=True).source
    assert sorted(set(places(drawn, "r"))) == [5.0, 7.0]
    before_a, after_a, before_b, after_b = places(drawn, "cx")
    assert before_a < after_a == before_b == after_b
    assert drawn.count('class="link"') == 2 and "a, before: 80%" in parsed(drawn).texts


@pytest.mark.parametrize("chart", [dot_chart, line_chart])
def test_equal_values_are_all_seen(chart: object) -> None:
    series = [Series(name, {"a": 0.1}) for name in "xyz"]
    drawn = chart("t", ["a"], series, "axis", None).source  # type: ignore[operator]
    assert len(set(zip(places(drawn, "cx"), places(drawn, "cy"), strict=True))) == 3


def test_columns_of_names_are_told_from_figures() -> None:
    drawn = table(["a", "b", "c"], [["x", "y", "1"], ["z", "y", "2"]], chosen=[1], names=2).source
    assert re.findall(r"<td([^>]*)>(\w)", drawn)[:3] == [(' class="name"', "x"), (' class="name"', "y"), ("", "1")]
    assert re.findall(r'<tr class="chosen"><td class="name">(\w)', drawn) == ["z"]


def test_long_names_of_rows_have_room() -> None:
    name = "neutral_shared, a rather long name of an agent"
    drawn = dot_chart("t", [name], [Series("s", {name: 0.1})], "x", None).source
    (end,) = re.findall(rf'<text x="([\d.]+)"[^>]*text-anchor="end">{name}<', drawn)
    assert float(end) > 6 * len(name)


def test_steps_are_dots_and_evaluations_a_line() -> None:
    losses = [(step, 0.5 / (step + 1)) for step in range(100)]
    held_out = [(50, 0.02), (100, 0.03)]
    curves = [Curve("loss", losses, line=False), Curve("held out", held_out, line=True)]
    drawn = step_chart("t", curves, 100, Mark("kept: step 50", 50)).source
    assert drawn.count("<circle") == 102 and drawn.count("<path") == 1
    assert {"held out, step 50: 0.02", "kept: step 50", "0.001", "100"} <= set(parsed(drawn).texts)
    columns = places(drawn, "cx")
    assert columns[:100] == sorted(columns[:100]) and columns[100] == pytest.approx(columns[50])
    nothing = step_chart("t", [Curve("loss", [], line=False)], 0).source
    assert "<circle" not in nothing and "NaN" not in nothing and "inf" not in nothing


def test_a_mark_at_an_end_stays_inside() -> None:
    drawn = step_chart("t", [Curve("loss", [(0, 1.0)], line=False)], 100, Mark("kept: step 100", 100)).source
    ((middle, text),) = re.findall(r'<text x="([\d.]+)"[^>]*class="limit">([^<]*)<', drawn)
    assert float(middle) + 6 * len(text) / 2 < 760


def test_many_steps_are_drawn_as_means_of_neighbours() -> None:
    few = [(float(step), 1.0) for step in range(MOST_DOTS)]
    assert thinned(few) == few
    found = thinned([(float(step), float(step % 2)) for step in range(10 * MOST_DOTS + 5)])
    assert len(found) <= MOST_DOTS and found[0] == (5.0, pytest.approx(5 / 11))
    assert thinned([]) == []


def test_elements() -> None:
    assert element("p", "a < b", Markup("<b>c</b>"), class_="x").source == '<p class="x">a &lt; b<b>c</b></p>'
    assert (
        element("line", x1=1, x2=2.125, stroke_width=0.5, y=None).source
        == '<line x1="1" x2="2.12" stroke-width="0.5"/>'
    )
    assert element("meta", name="viewport").source == '<meta name="viewport"/>'
    assert len({pair for pair in COLOURS}) == len(COLOURS)
