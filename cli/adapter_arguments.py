"""Parses `--adapters plan=DIR,action=DIR` and `--adapters DIR,DIR`; a DIR may be a hub id."""

from __future__ import annotations

import typer

from lragent.files.user_path import user_path


def parse_adapters(text: str) -> dict[str, str]:
    """Directories or hub ids by agent name, in the order of the text. A directory without a name gives its own name.

    Raises:
        typer.BadParameter: an empty entry, or a name given twice.
    """
    adapters: dict[str, str] = {}
    for entry in text.split(","):
        name, source = _name_and_source(entry.strip())
        if name in adapters:
            raise typer.BadParameter(
                f"two adapters have the name {name!r}: {adapters[name]} and {source}. Name them: {name}=DIR,OTHER=DIR"
            )
        adapters[name] = source
    return adapters


def _name_and_source(entry: str) -> tuple[str, str]:
    name, equals, source = entry.partition("=")
    if not equals:
        name = user_path(entry).resolve().name.partition("@")[0]  # the name of a hub id ends before its revision
        if not entry or not name:
            raise typer.BadParameter(f"an entry of --adapters is no directory: {entry!r}")
        return name, entry
    if not name.strip() or not source.strip():
        raise typer.BadParameter(f"expected NAME=DIR, found {entry!r}")
    return name.strip(), source.strip()
