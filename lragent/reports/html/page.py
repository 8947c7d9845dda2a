"""A whole page: title, sections and their style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lragent.reports.html.markup import Content, Markup, element, joined
from lragent.reports.html.series import COLOURS

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #5d6670; --line: #d8dde2; --back: #ffffff; --panel: #f6f7f9;
 --limit: #c62828; %s }
@media (prefers-color-scheme: dark) {
 :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #39414a; --back: #14181c; --panel: #1c2127; --limit: #ff8a80; %s }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--back); color: var(--ink);
 font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption, caption { color: var(--soft); }
.verdict { background: var(--panel); border-left: 4px solid var(--series-0); padding: .75rem 1rem; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th.name, td.name { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
tr.chosen td { font-weight: 600; }
figure { margin: 1rem 0; }
svg { width: 100%%; min-width: 40rem; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); }
svg text.soft { fill: var(--soft); }
.grid { stroke: var(--line); }
.limit { stroke: var(--limit); stroke-dasharray: 4 3; fill: none; }
svg text.limit { fill: var(--limit); stroke: none; }
.link { stroke: var(--soft); stroke-width: 2; }
.ring { fill: var(--back); }
figcaption { font-size: .92rem; }
pre { background: var(--panel); padding: .75rem 1rem; font: .88rem/1.5 ui-monospace, monospace;
 white-space: pre-wrap; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; padding: 0; list-style: none;
 font-size: .88rem; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%%; margin-right: .4rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    parts: Sequence[Markup]


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Source of a page that needs no other file; it follows the reader's light or dark setting."""
    light, dark = (_colours(number) for number in (0, 1))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        Markup(f"<style>{_STYLE % (light, dark)}</style>"),
    ]
    body: list[Markup] = [element("h1", title), element("p", subtitle, class_="soft")]
    for section in sections:
        body.append(element("section", element("h2", section.heading), *section.parts))
    document = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{document.source}\n"


def paragraph(*content: Content) -> Markup:
    return element("p", *content)


def verdict(text: str) -> Markup:
    """The one sentence that a reader should take away."""
    return element("p", text, class_="verdict")


def code(lines: Sequence[str]) -> Markup:
    """Commands, one a line."""
    return element("pre", "\n".join(lines))


def bullets(items: Sequence[Content]) -> Markup:
    return element("ul", joined([element("li", item) for item in items]))


def _colours(mode: int) -> str:
    return " ".join(f"--series-{number}: {pair[mode]};" for number, pair in enumerate(COLOURS))
