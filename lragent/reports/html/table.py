"""Tables: the first columns name the rows, the others hold figures."""

from __future__ import annotations

from collections.abc import Container, Sequence

from lragent.reports.html.markup import Markup, element


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    chosen: Container[int] = (),
    names: int = 1,
) -> Markup:
    """A table that scrolls by itself where the page is too narrow.

    Args:
        chosen: numbers of rows that stand out.
        names: number of columns, from the first on, that hold names; the others hold figures.
    """
    left = ["name" if number < names else None for number in range(len(columns))]

    def line(tag: str, texts: Sequence[str], **attributes: str | None) -> list[Markup]:
        return [element(tag, text, class_=name, **attributes) for text, name in zip(texts, left, strict=True)]

    head = element("thead", element("tr", *line("th", columns, scope="col")))
    body = [
        element("tr", *line("td", row), class_="chosen" if number in chosen else None)
        for number, row in enumerate(rows)
    ]
    title = (element("caption", caption),) if caption else ()
    return element("div", element("table", *title, head, element("tbody", *body)), class_="scroll")
