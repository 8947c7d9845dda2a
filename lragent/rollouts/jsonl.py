"""JSON lines: one JSON object a line, in UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lragent.errors import TaskFileError

SHOWN = 60


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields line numbers, from 1, and lines; blank lines are left out.

    Raises:
        TaskFileError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TaskFileError(f"{path} can't be read: {error.strerror}", "Check the path.") from error


def parse_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The object of a line.

    Raises:
        TaskFileError: the line is no JSON object in UTF-8; names file, line and what was found.
    """
    hint = "Write one JSON object a line."
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskFileError(
            f"{path} line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
            "Save the file as UTF-8.",
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number that is too long; objects that are nested too deeply
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise TaskFileError(f"{path} line {number}: not JSON ({what}): {shorten(text)}", hint) from error
    if not isinstance(value, dict):
        raise TaskFileError(f"{path} line {number}: not a JSON object but {shorten(text)}", hint)
    return value


def line_of(value: dict[str, Any]) -> bytes:
    """An object as a line, newline included."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def shorten(text: str) -> str:
    """Text on one line, cut to `SHOWN` characters."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
