"""Tables: the first column names the rows, the others hold figures."""

from __future__ import annotations

from collections.abc import Sequence

from lragent.reports.html.markup import Markup, element


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", chosen: int | None = None
) -> Markup:
    """A table that scrolls by itself where the page is too narrow.

    Args:
        chosen: number of a row that stands out; None: none.
    """
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in columns)))
    body = [
        element("tr", *(element("td", cell) for cell in row), class_="chosen" if number == chosen else None)
        for number, row in enumerate(rows)
    ]
    title = (element("caption", caption),) if caption else ()
    return element("div", element("table", *title, head, element("tbody", *body)), class_="scroll")
