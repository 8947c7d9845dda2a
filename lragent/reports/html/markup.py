"""Elements of HTML and SVG. Text is escaped; only `Markup` is taken as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

_EMPTY = frozenset(("br", "meta", "circle", "line", "path", "rect"))  # elements without content


@dataclass(frozen=True)
class Markup:
    """Source text of HTML that is safe to put into a page."""

    source: str


Content = Markup | str


def element(name: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """An element with its content and attributes.

    Args:
        content: text, which is escaped, and other elements.
        attributes: None leaves one out; a trailing `_` is dropped (`class_`), other `_` become `-` (`stroke_width`).
            Numbers are rounded to two decimals.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not content:
        return Markup(f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{joined(content).source}</{name}>")


def joined(content: Iterable[Content]) -> Markup:
    """Pieces one after the other."""
    return Markup("".join(piece.source if isinstance(piece, Markup) else html.escape(piece) for piece in content))


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
