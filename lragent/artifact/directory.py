"""The artifact directory: written to a temporary name and renamed, read with every file checked.

NAME.lragent/
  manifest.json                      versions, agents, schemas, files
  programs/{split,dense}.json        rewritten programs, not lowered, no weights
  programs/{split,dense}-adapters.safetensors   how their constants follow from adapters
  compiled/TARGET/KEY.pt2            unit "model"; KEY: see `lragent.artifact.compiled_files.CompiledKey`
  compiled/TARGET/KEY-HASH/          unit "layer": plan.json and its packages
  weights/{base,adapters}.safetensors  (adapters-HASH.safetensors after an update)
  tokenizer/                         (tokenizer-HASH/ after an update)
  drift.json                         measured drift of sharing schemes (`lragent.artifact.kept_drift`)
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lragent.artifact.manifest import MANIFEST, Manifest, read_manifest
from lragent.errors import ArtifactError
from lragent.files.checked_file import FileEntry, describe_file, sha256_of
from lragent.files.locks import directory_lock
from lragent.files.replace_directory import put_in_place


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its directory and its manifest."""

    directory: Path
    manifest: Manifest

    def file(self, entry: FileEntry, hashed: bool = True) -> Path:
        """Path of a file of the artifact, after a check of its size and, if `hashed`, its sha256.

        Raises:
            ArtifactError: the file is missing, or its size or hash differs from the manifest's.
        """
        path = self.directory / entry.path
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "The artifact is incomplete. Convert the model again.")
        if path.stat().st_size != entry.size:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.size}",
                "The file is damaged. Convert the model again.",
            )
        if hashed and (found := sha256_of(path)) != entry.sha256:
            raise ArtifactError(
                f"{path} has sha256 {found}, the manifest says {entry.sha256}",
                "The file was changed. Convert the model again.",
            )
        return path

    def weights(self, hashed: bool = False) -> dict[str, Tensor]:
        """All weights by name, as views of the mapped files; tied names share one tensor.

        `load` checks the files by size only (`hashed=False`); `lragent verify` hashes them.

        Raises:
            ArtifactError: see `file`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        for entry in self.manifest.weights:
            path = self.file(entry, hashed)
            try:
                tensors.update(load_file(path))
            except (SafetensorError, ValueError) as error:
                raise ArtifactError(f"{path} is damaged: {error}", "Convert the model again.") from error
        tensors.update({name: tensors[source] for name, source in self.manifest.aliases.items()})
        return tensors


def open_artifact(path: str | Path) -> Artifact:
    """Opens an artifact without reading weights.

    Raises:
        ArtifactError: see `read_manifest`.
    """
    directory = Path(path)
    return Artifact(directory, read_manifest(directory))


def require_free(out: Path, overwrite: bool) -> None:
    """Raises ArtifactError if `out` exists and may not be replaced, or is not an artifact."""
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists", "Choose another name, or replace it (--overwrite).")
    if out.exists() and not (out / MANIFEST).is_file():
        raise ArtifactError(f"{out} exists and is not an artifact", "Choose another name.")


@contextmanager
def new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `out`, which replaces `out` when the body has finished.

    Directories left by killed processes are removed; they are recognized by their free locks.

    Raises:
        ArtifactError: see `require_free`; or the disk is full or can't be written.
    """
    require_free(out, overwrite)
    prefix = f".{out.name}.unfinished-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(prefix)}*"):
            with directory_lock(left, wait=False) as abandoned:
                if abandoned:
                    shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    except OSError as error:
        raise cannot_write(out, error) from error
    with directory_lock(temporary):
        try:
            yield temporary
            require_free(out, overwrite)  # another process may have written it
            temporary.chmod(0o755)
            put_in_place(temporary, out)
        except OSError as error:
            raise cannot_write(out, error) from error
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} can't be written: {error}", "Make room or choose another place. Then try again.")


def place(built: Path, directory: Path, relative: str) -> FileEntry:
    """Copies a file into an artifact under a temporary name, renames it, and describes it.

    The caller holds the artifact's lock (`directory_lock`) or its temporary directory (`new_directory`).
    """
    target = directory / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.new")
    shutil.copyfile(built, temporary)
    temporary.replace(target)
    return describe_file(directory, relative)
