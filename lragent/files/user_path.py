"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from lragent.errors import RequestError


def user_path(path: str | Path) -> Path:
    """A path with `~` and `~NAME` at its start expanded.

    Raises:
        RequestError: the home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RequestError(f"{path}: the home directory is unknown ({error})", "Write the whole path.") from error
