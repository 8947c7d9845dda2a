"""A file of an artifact with its size and hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact, its size and, for all but large weight files, what it must hash to when it is read."""

    path: str
    size: int
    sha256: str


def describe_file(directory: Path, relative: str) -> FileEntry:
    path = directory / relative
    return FileEntry(relative, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
