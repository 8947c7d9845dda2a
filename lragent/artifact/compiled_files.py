"""Compiled files of an artifact: a package, or a plan in a folder with the packages that it names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from lragent.artifact.directory import Artifact, place
from lragent.artifact.manifest import read_manifest, write_manifest
from lragent.compile.segments.plan import PLAN, is_plan, read_plan
from lragent.errors import ArtifactError
from lragent.files.checked_file import FileEntry, sha256_of
from lragent.files.locks import directory_lock
from lragent.program.cache_schema import Layout
from lragent.program.dtypes import DTYPES, LAYOUTS, dtype_name


@dataclass(frozen=True)
class CompiledKey:
    """The name of a compiled program among those for one target: "LAYOUT-GRAPH-KVDTYPE".

    Args:
        graph: name of a graph of an attention implementation (`lragent.kernels.dispatch.graphs`).
        kv_dtype: dtype of the cache.
    """

    layout: Layout
    graph: str
    kv_dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layout}-{self.graph}-{dtype_name(self.kv_dtype)}"

    @classmethod
    def parse(cls, text: str) -> CompiledKey:
        """Reads a key from a manifest.

        Raises:
            ArtifactError: the text is no key.
        """
        parts = text.split("-")
        layout = next((name for name in LAYOUTS if name == parts[0]), None)
        if len(parts) != 3 or layout is None or not parts[1] or parts[2] not in DTYPES:
            raise ArtifactError(f"{text!r} does not name a compiled program", "Convert the model again.")
        return cls(layout, parts[1], DTYPES[parts[2]])

    def package(self, target: str) -> str:
        """Path of the package in an artifact, where the whole program is compiled at once."""
        return f"compiled/{target}/{self}.pt2"

    def folder(self, target: str, plan: Path) -> str:
        """Path of the folder in an artifact that holds a plan and its packages.

        The plan holds the hashes of its packages, so processes that compile at once write different folders.
        """
        return f"compiled/{target}/{self}-{sha256_of(plan)[:12]}"


def unit_of(entry: FileEntry) -> str:
    """The unit in which a file was compiled (`lragent.compile.compile.UNITS`)."""
    return "layer" if is_plan(PurePosixPath(entry.path)) else "model"


def place_compiled(built: Path, directory: Path, target: str, key: CompiledKey) -> FileEntry:
    """Copies the output of `compile_graph` into an artifact and describes the file to load.

    Raises:
        ArtifactError: a plan is damaged.
        OSError: the directory can't be written.
    """
    if not is_plan(built):
        return place(built, directory, key.package(target))
    folder = key.folder(target, built)
    for entry in read_plan(built).packages:
        place(built.parent / entry.path, directory, f"{folder}/{entry.path}")
    return place(built, directory, f"{folder}/{PLAN}")


def compiled_file(artifact: Artifact, entry: FileEntry) -> Path:
    """Path of the file to load. The file is checked, and so are all packages that a plan names.

    Raises:
        ArtifactError: a file is missing or changed.
    """
    path = artifact.file(entry)
    if is_plan(path):
        folder = PurePosixPath(entry.path).parent
        for package in read_plan(path).packages:
            artifact.file(dataclasses.replace(package, path=str(folder / package.path)))
    return path


def keep_compiled(artifact: Artifact, target: str, key: CompiledKey, built: Path) -> None:
    """Adds a file that was compiled when the artifact was loaded.

    Raises:
        OSError: the directory can't be written.
    """
    with directory_lock(artifact.directory):
        entry = place_compiled(built, artifact.directory, target, key)
        current = read_manifest(artifact.directory)
        compiled = {**current.compiled, target: {**current.compiled.get(target, {}), str(key): entry}}
        write_manifest(dataclasses.replace(current, compiled=compiled), artifact.directory)
