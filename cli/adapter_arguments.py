"""Parses `--adapters plan=DIR,action=DIR` and `--adapters DIR,DIR`."""

from __future__ import annotations

from pathlib import Path

import typer


def parse_adapters(text: str) -> dict[str, Path]:
    """Directories by agent name, in the order of the text. A directory without a name gives its own name.

    Raises:
        typer.BadParameter: an empty entry, or a name given twice.
    """
    adapters: dict[str, Path] = {}
    for entry in text.split(","):
        name, path = _name_and_path(entry.strip())
        if name in adapters:
            raise typer.BadParameter(
                f"two adapters have the name {name!r}: {adapters[name]} and {path}. Name them: {name}=DIR,OTHER=DIR"
            )
        adapters[name] = path
    return adapters


def _name_and_path(entry: str) -> tuple[str, Path]:
    name, equals, directory = entry.partition("=")
    if not equals:
        path = Path(entry)
        if not entry or not path.resolve().name:
            raise typer.BadParameter(f"an entry of --adapters is no directory: {entry!r}")
        return path.resolve().name, path
    if not name.strip() or not directory.strip():
        raise typer.BadParameter(f"expected NAME=DIR, found {entry!r}")
    return name.strip(), Path(directory.strip())
