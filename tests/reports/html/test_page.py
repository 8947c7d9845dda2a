"""Pages need no other file, and text in them stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lragent.reports.html.dot_chart import dot_chart
from lragent.reports.html.line_chart import line_chart
from lragent.reports.html.log_scale import LogScale, tick_label
from lragent.reports.html.markup import Markup, element
from lragent.reports.html.page import Section, bullets, page, paragraph, verdict
from lragent.reports.html.scatter_chart import scatter_chart
from lragent.reports.html.series import COLOURS, Series
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
        scatter_chart(NASTY, {"a": 1.0, NASTY: 2.5}, SERIES, NASTY, NASTY),
    )
    parts = (*charts, table([NASTY, "b"], [[NASTY, "1"]], NASTY, 0), paragraph(NASTY), verdict(NASTY), bullets([NASTY]))
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
    assert [tick_label(value) for value in (1e-5, 0.001, 1.0, 100.0)] == ["1e-5", "0.001", "1", "100"]


def test_elements() -> None:
    assert element("p", "a < b", Markup("<b>c</b>"), class_="x").source == '<p class="x">a &lt; b<b>c</b></p>'
    assert (
        element("line", x1=1, x2=2.125, stroke_width=0.5, y=None).source
        == '<line x1="1" x2="2.12" stroke-width="0.5"/>'
    )
    assert element("meta", name="viewport").source == '<meta name="viewport"/>'
    assert len({pair for pair in COLOURS}) == len(COLOURS)
