"""Describes a file by its size and hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileEntry:
    """A file of an artifact.

    Args:
        path: relative to its directory.
        size: in bytes.
        sha256: hex digest; readers skip the check for large weight files.
    """

    path: str
    size: int
    sha256: str


def describe_file(directory: Path, relative: str) -> FileEntry:
    """Reads size and hash of a file.

    Raises:
        OSError: the file can't be read.
    """
    path = directory / relative
    return FileEntry(relative, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
