"""Finds a model or an adapter by its path or its id on the Hugging Face hub, and downloads what it needs from there.

An existing path wins over an id. Of a repository, weights, config and tokenizer files are downloaded into the hub's
cache, and no code. `HF_HUB_OFFLINE=1` uses the cache only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lragent.errors import AdapterError, ModelError, UserError, shortened
from lragent.files.user_path import user_path
from lragent.loading.checkpoint import Checkpoint, read_usable_config
from lragent.text.load_tokenizer import CHAT_TEMPLATES, TOKENIZER_FILES

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_LOG_IN = "For a private or gated repository, accept its terms and log in: hf auth login."
_OFFLINE = "HF_HUB_OFFLINE=1 uses the cache only. Otherwise check the connection, or give a folder."


@dataclass(frozen=True)
class Located:
    """A folder, or a GGUF file, on this machine.

    Args:
        pin: hub id and commit, "OWNER/NAME@COMMIT"; "" if it did not come from the hub.
    """

    path: Path
    pin: str = ""


@dataclass(frozen=True)
class Files:
    """Files of a repository that are downloaded, as patterns of the hub.

    Args:
        known: files without weights.
        older: weights of an older format, for a repository without `weights`.
    """

    known: tuple[str, ...]
    weights: tuple[str, ...]
    older: tuple[str, ...]


_TOKENIZER = (*TOKENIZER_FILES, f"{CHAT_TEMPLATES}/*.jinja", "chat_template.json")
MODEL_FILES = Files(
    known=("config.json", "generation_config.json", *_TOKENIZER),
    weights=("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    older=("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
ADAPTER_FILES = Files(
    known=("adapter_config.json", *_TOKENIZER), weights=("adapter_model.safetensors",), older=("adapter_model.bin",)
)


def locate_model(source: str | Path, pin: str = "") -> Located:
    """Finds a model directory, a GGUF file, or the model with a hub id (OWNER/NAME or OWNER/NAME@REVISION).

    Args:
        pin: a known commit of a repository, "OWNER/NAME@COMMIT". The same id without a revision means this commit.

    Raises:
        ModelError: the repository or revision doesn't exist or can't be reached, or its model is quantised or needs
            code of its own; then no weights are downloaded.
    """
    return _path(source) or _snapshot(str(source), pin, MODEL_FILES, ModelError, "model")


def locate_adapter(name: str, source: str | Path, pin: str = "") -> Located:
    """Finds an adapter directory, or the adapter with a hub id.

    Args:
        name: the agent.
        pin: see `locate_model`.

    Raises:
        AdapterError: the repository or revision doesn't exist or can't be reached.
    """
    return _path(source) or _snapshot(str(source), pin, ADAPTER_FILES, AdapterError, f"adapter {name}")


def _path(source: str | Path) -> Located | None:
    """The path that a source means; None if it is a hub id."""
    path = user_path(source)
    return Located(path) if path.exists() or _ID.fullmatch(str(source)) is None else None


def _snapshot(hub_id: str, pin: str, files: Files, error: type[UserError], subject: str) -> Located:
    repository, _, revision = hub_id.partition("@")
    if not revision and pin.startswith(f"{repository}@"):
        revision = pin.removeprefix(f"{repository}@")
    folder = _download(repository, revision or None, files.known, error, subject)
    commit = folder.name
    if (folder / "config.json").is_file():
        read_usable_config(Checkpoint(folder))
    _download(repository, commit, files.weights, error, subject)
    if not any(file for pattern in files.weights for file in folder.glob(pattern)):
        _download(repository, commit, files.older, error, subject)
    return Located(folder, f"{repository}@{commit}")


def _download(
    repository: str, revision: str | None, patterns: Sequence[str], kind: type[UserError], subject: str
) -> Path:
    """The folder of a repository's snapshot in the hub's cache, with the files that match; its name is the commit.

    Raises:
        UserError: of type `kind`, with `subject` in its message.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{subject}: there is no folder {repository}, and {repository} on the Hugging Face hub"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise kind(f"{where} is gated", _LOG_IN) from error
    except RepositoryNotFoundError as error:
        raise kind(f"{where} doesn't exist", f"Check the path or id. {_LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise kind(f"{where} has no revision {revision}", "Give a branch, a tag or a commit of it.") from error
    except LocalEntryNotFoundError as error:
        raise kind(f"{where} can't be reached and is not in the cache: {shortened(error)}", _OFFLINE) from error
    except Exception as error:  # errors of the HTTP client have no common type
        raise kind(f"{where} can't be downloaded: {shortened(error)}", "Try again, or give a folder.") from error
