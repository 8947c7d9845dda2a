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
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lragent.checkpoint import find_checkpoint
from lragent.errors import ArtifactError, ModelError, UserError, shortened
from lragent.locks import directory_lock
from lragent.manifest import FileEntry, Manifest, read_manifest
from lragent.replace_directory import put_in_place
from lragent.runtime.tokenizer import TokenizerFile

BASE_WEIGHTS = "weights/base.safetensors"
ADAPTER_FILES = "weights/adapters"  # how names of adapter weight files begin
ADAPTER_WEIGHTS = f"{ADAPTER_FILES}.safetensors"
TOKENIZER = "tokenizer"
FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (FAST_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
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


def describe_file(directory: Path, relative: str) -> FileEntry:
    path = directory / relative
    return FileEntry(relative, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def write_weights(
    directory: Path, tensors: Mapping[str, Tensor], adapter_names: frozenset[str]
) -> tuple[tuple[FileEntry, ...], dict[str, str]]:
    """Writes every tensor once: base weights and what the adapters became in separate files.

    Returns:
        The files, and aliases: name of a tied tensor -> the name under which it is stored.
    """
    stored, aliases = stored_once(tensors)
    files = {
        BASE_WEIGHTS: {name: tensor for name, tensor in stored.items() if name not in adapter_names},
        ADAPTER_WEIGHTS: {name: tensor for name, tensor in stored.items() if name in adapter_names},
    }
    (directory / "weights").mkdir()
    entries = [save_tensors(directory, relative, contents) for relative, contents in files.items() if contents]
    return tuple(entries), aliases


def stored_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under one of its names, and its other names -> that one."""
    names: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity in names and tensor.numel() > 0:
            aliases[name] = names[identity]
            continue
        names[identity] = name
        stored[name] = tensor.detach().contiguous()
    return stored, aliases


def save_tensors(directory: Path, relative: str, tensors: dict[str, Tensor]) -> FileEntry:
    """Writes a safetensors file into an artifact.

    Raises:
        OSError: it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, directory / relative)
    except SafetensorError as error:
        raise OSError(f"{relative}: {error}") from error
    (directory / relative).chmod(0o644)
    return describe_file(directory, relative)


def write_tokenizer(source: str | None, directory: Path) -> bool:
    """Saves the model's tokenizer; False if it has none.

    A `tokenizer.json` is copied as it is, with the files that belong to it: reading and saving it again could change it
    (transformers rebuilds some models' tokenizers from their vocabulary). Older files are converted to one, and so is
    what a GGUF file holds if no `tokenizer.json` lies beside it.

    Raises:
        ModelError: there are tokenizer files, but they can't be read.
    """
    checkpoint = None if source is None else find_checkpoint(Path(source))
    if checkpoint is None:
        return False
    folder, target = checkpoint.directory, directory / TOKENIZER
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", FAST_TOKENIZER)) and not checkpoint.gguf:
        return False
    try:
        if (folder / FAST_TOKENIZER).is_file():
            TokenizerFile(folder / FAST_TOKENIZER)
            target.mkdir()
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)
        else:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(folder, **checkpoint.arguments).save_pretrained(target)
    except Exception as error:
        remedy = "Put the model's tokenizer.json beside it." if checkpoint.gguf else "Mend it, or remove its files."
        reason = error.message if isinstance(error, UserError) else shortened(error)
        raise ModelError(f"the tokenizer in {source} can't be read: {reason}", remedy) from error
    return (target / FAST_TOKENIZER).is_file()
