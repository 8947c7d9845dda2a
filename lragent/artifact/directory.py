"""The artifact directory: written to a temporary name and renamed, read with every file checked.

NAME.lragent/
  manifest.json                      versions, agents, schemas, files
  programs/{split,dense}.pt2         rewritten programs, not lowered, no weights
  compiled/TARGET/LAYOUT-ATTENTION-KVDTYPE.pt2, or where compiled by layer
  compiled/TARGET/LAYOUT-ATTENTION-KVDTYPE-HASH/{plan.json,segment-NUMBER.pt2}
  weights/{base,adapters}.safetensors  (adapters-HASH.safetensors after an update)
  tokenizer/
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

from lragent.artifact.manifest import Manifest, read_manifest
from lragent.errors import ArtifactError
from lragent.files.checked_file import FileEntry, describe_file, sha256_of
from lragent.files.locks import directory_lock
from lragent.files.replace_directory import put_in_place

# Weight files are checked by size when an artifact is loaded; `lragent verify` hashes them too.


@dataclass(frozen=True)
class Artifact:
    """An artifact that was opened: its directory and manifest."""

    directory: Path
    manifest: Manifest

    def file(self, entry: FileEntry, hashed: bool = True) -> Path:
        """Path of a file of the artifact, checked.

        Raises:
            ArtifactError: missing, or its size or hash is not the manifest's.
        """
        path = self.directory / entry.path
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "The artifact is not whole; convert again.")
        if path.stat().st_size != entry.size:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.size}",
                "The file is damaged; convert again.",
            )
        if hashed and (found := sha256_of(path)) != entry.sha256:
            raise ArtifactError(
                f"{path} has sha256 {found}, the manifest says {entry.sha256}",
                "The file was changed; convert again.",
            )
        return path

    def weights(self, hashed: bool = False) -> dict[str, Tensor]:
        """All weights by name, as views of the mapped files; tied names share one tensor."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        for entry in self.manifest.weights:
            path = self.file(entry, hashed)
            try:
                tensors.update(load_file(path))
            except (SafetensorError, ValueError) as error:
                raise ArtifactError(f"{path} is damaged: {error}", "Convert again.") from error
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
    """Raises ArtifactError if `out` can't be written: it exists and may not be replaced, or is no artifact."""
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists", "Choose another name, or overwrite it (--overwrite).")
    if out.exists() and not (out / "manifest.json").is_file():
        raise ArtifactError(f"{out} exists and is not an artifact", "Choose another name.")


@contextmanager
def new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its place once the body has finished.

    Those that killed processes left are removed: nobody holds their lock any more.

    Raises:
        ArtifactError: see `require_free`; the disk is full or can't be written.
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
            require_free(out, overwrite)  # somebody else may have written it meanwhile
            temporary.chmod(0o755)
            put_in_place(temporary, out)
        except OSError as error:
            raise cannot_write(out, error) from error
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} can't be written: {error}", "Make room or choose another place, and try again.")


def place(built: Path, directory: Path, relative: str) -> FileEntry:
    """Copies a file into an artifact under a temporary name, renames it, and describes it.

    Nobody else may write the artifact meanwhile: see `directory_lock`.
    """
    target = directory / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.new")
    shutil.copyfile(built, temporary)
    temporary.replace(target)
    return describe_file(directory, relative)
