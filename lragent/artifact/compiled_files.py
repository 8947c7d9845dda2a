"""What was compiled for a machine, in an artifact: a package, or a plan in a folder with the packages that it names."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from lragent.artifact.directory import Artifact, place
from lragent.artifact.manifest import read_manifest, write_manifest
from lragent.compile.segments.plan import PLAN, read_plan
from lragent.files.checked_file import FileEntry, sha256_of
from lragent.files.locks import directory_lock


def place_compiled(built: Path, directory: Path, target: str, key: str) -> FileEntry:
    """Copies what `compile_graph` wrote into an artifact and describes the file to load.

    Args:
        key: "layout-attention-kvdtype".

    Raises:
        ArtifactError: a plan that is damaged.
        OSError: the directory can't be written.
    """
    stem = f"compiled/{target}/{key}"
    if built.name != PLAN:
        return place(built, directory, f"{stem}.pt2")
    # The plan holds the packages' hashes: processes that compile at once never mix their files.
    folder = f"{stem}-{sha256_of(built)[:12]}"
    for entry in read_plan(built).packages:
        place(built.parent / entry.path, directory, f"{folder}/{entry.path}")
    return place(built, directory, f"{folder}/{PLAN}")


def compiled_file(artifact: Artifact, entry: FileEntry) -> Path:
    """Path of the file to load; it, and every package that it names, is checked.

    Raises:
        ArtifactError: one is missing or changed.
    """
    path = artifact.file(entry)
    if unit_of(entry) == "layer":
        folder = PurePosixPath(entry.path).parent
        for package in read_plan(path).packages:
            artifact.file(dataclasses.replace(package, path=str(folder / package.path)))
    return path


def unit_of(entry: FileEntry) -> str:
    """The unit in which it was compiled, see `lragent.compile.compile.UNITS`."""
    return "layer" if PurePosixPath(entry.path).name == PLAN else "model"


def keep_compiled(artifact: Artifact, target: str, key: str, built: Path) -> None:
    """Adds what was compiled at load time to an artifact.

    Raises:
        OSError: the directory can't be written.
    """
    with directory_lock(artifact.directory):
        entry = place_compiled(built, artifact.directory, target, key)
        current = read_manifest(artifact.directory)
        compiled = {**current.compiled, target: {**current.compiled.get(target, {}), key: entry}}
        write_manifest(dataclasses.replace(current, compiled=compiled), artifact.directory)
