"""HTML pages that commands write beside their tables."""

from __future__ import annotations

from pathlib import Path

from lragent.errors import RequestError

HINT = "Choose another file (--html)."


def require_page_place(file: Path) -> None:
    """Checks the place of a page before the work that it is about.

    Raises:
        RequestError: its folder is missing, or it is a folder.
    """
    if file.is_dir():
        raise RequestError(f"{file} can't be written: it is a folder", HINT)
    if not file.parent.is_dir():
        raise RequestError(f"{file} can't be written: there is no folder {file.parent}", HINT)


def write_page(file: Path, source: str) -> None:
    """Writes a page.

    Raises:
        RequestError: the file can't be written.
    """
    try:
        file.write_text(source, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file} can't be written: {error.strerror}", HINT) from error
