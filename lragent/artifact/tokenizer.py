"""The tokenizer in an artifact: found beside the model and its adapters, saved, and loaded again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lragent.artifact.directory import Artifact
from lragent.errors import AdapterError, ArtifactError, ModelError, RequestError, UserError
from lragent.files.checked_file import FileEntry, describe_file
from lragent.files.user_path import user_path
from lragent.loading.checkpoint import find_checkpoint
from lragent.loading.model import LoadedModel
from lragent.program.agent import Agent
from lragent.text.choose_tokenizer import ArtifactTokenizer, FoundTokenizer, choose_tokenizer
from lragent.text.load_tokenizer import live_tokenizer, load_tokenizer, tokenizer_files
from lragent.text.save_tokenizer import save_tokenizer
from lragent.text.transformers_tokenizer import TransformersTokenizer

TOKENIZER = "tokenizer"  # folder in an artifact


def artifact_tokenizer(loaded: LoadedModel) -> ArtifactTokenizer:
    """The tokenizer for a model and its adapters.

    Raises:
        ModelError: the model has tokenizer files, but they can't be read.
        AdapterError: the same of an adapter, or two adapters bring tokenizers that encode differently.
    """
    config = loaded.model.config
    return choose_tokenizer(
        _of_model(loaded.tokenizer_source, config),
        _of_adapters(loaded.adapter_folders, config),
        loaded.stop_token_ids,
        loaded.vocab_size,
    )


def with_stops(agents: tuple[Agent, ...], text: ArtifactTokenizer) -> tuple[Agent, ...]:
    """Agents with the ends of text of their adapters' tokenizers."""
    return tuple(replace(agent, stop_token_ids=text.agent_stops.get(agent.name, ())) for agent in agents)


def write_tokenizer(text: ArtifactTokenizer, directory: Path, folder: str = TOKENIZER) -> tuple[FileEntry, ...]:
    """Saves an artifact's tokenizer in a folder of `directory`; returns its files, none if there is no tokenizer.

    Raises:
        ModelError: what was saved is loaded as another tokenizer.
    """
    if text.found is None:
        return ()
    target = directory / folder
    try:
        save_tokenizer(text.found.source, target, text.found.folder)
    except UserError as error:
        raise ModelError(error.message, error.hint) from error
    files = sorted(file.relative_to(directory).as_posix() for file in target.rglob("*") if file.is_file())
    return tuple(describe_file(directory, name) for name in files)


def replace_tokenizer(text: ArtifactTokenizer, scratch: Path, artifact: Artifact) -> tuple[FileEntry, ...]:
    """Puts a tokenizer beside the artifact's own one under a name that holds its hash; does nothing if it is the same.

    Args:
        scratch: an empty folder inside the artifact's directory.

    Returns:
        The files of the tokenizer, for the manifest.
    """
    written = write_tokenizer(text, scratch)
    held = artifact.manifest.tokenizer
    contents = [{(entry.path.partition("/")[2], entry.sha256) for entry in entries} for entries in (written, held)]
    if contents[0] == contents[1] or not written:
        return held if written else ()
    name = f"{TOKENIZER}-{hashlib.sha256(repr(sorted(contents[0])).encode()).hexdigest()[:12]}"
    if not (artifact.directory / name).exists():
        (scratch / TOKENIZER).rename(artifact.directory / name)
    return tuple(replace(entry, path=f"{name}/{entry.path.partition('/')[2]}") for entry in written)


def tokenizer_of(artifact: Artifact) -> TransformersTokenizer | None:
    """The artifact's tokenizer; None if it has none.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    files = [artifact.file(entry, hashed=False) for entry in artifact.manifest.tokenizer]
    if not files:
        return None
    folder = artifact.directory / artifact.manifest.tokenizer[0].path.partition("/")[0]
    try:
        source = load_tokenizer(folder)
    except UserError as error:
        raise ArtifactError(error.message, "Convert the model again.") from error
    return TransformersTokenizer(source, artifact.manifest.chat_templates)


def tokenizer_from(source: Any) -> TransformersTokenizer | None:
    """A tokenizer from a directory, or from a live transformers tokenizer, which isn't changed.

    Raises:
        RequestError: there is no tokenizer that can be used.
    """
    if source is None:
        return None
    try:
        if not isinstance(source, (str, Path)):
            return TransformersTokenizer(live_tokenizer(source))
        folder = user_path(source)
        if not tokenizer_files(folder):
            raise RequestError(f"no tokenizer in {folder}", "Give a folder saved with save_pretrained.")
        return TransformersTokenizer(load_tokenizer(folder))
    except UserError as error:
        raise RequestError(error.message, error.hint) from error


def _of_model(source: Any, config: Any) -> FoundTokenizer | None:
    """The model's tokenizer; None if it has none.

    Args:
        source: a model directory, a GGUF file, a live transformers tokenizer, or None.
    """
    if source is None:
        return None
    try:
        if not isinstance(source, (str, Path)):
            return FoundTokenizer(live_tokenizer(source), None)
        checkpoint = find_checkpoint(Path(source))
        folder = checkpoint.directory
        if (folder / "tokenizer.json").is_file() or (checkpoint.gguf is None and tokenizer_files(folder)):
            return FoundTokenizer(load_tokenizer(folder, config=config), folder)
        if checkpoint.gguf is None:
            return None
        return FoundTokenizer(load_tokenizer(folder, checkpoint.gguf), None)
    except UserError as error:
        raise ModelError(error.message, error.hint) from error


def _of_adapters(folders: Mapping[str, Path], config: Any) -> dict[str, FoundTokenizer]:
    """Tokenizers by agent, of adapters that bring one. Equal files are read once."""
    known: dict[str, FoundTokenizer] = {}
    found: dict[str, FoundTokenizer] = {}
    for name, folder in folders.items():
        files = tokenizer_files(folder)
        if files:
            digest = repr([(file.name, describe_file(folder, file.name).sha256) for file in files])
            try:
                known[digest] = known.get(digest) or FoundTokenizer(load_tokenizer(folder, config=config), folder)
            except UserError as error:
                raise AdapterError(f"adapter {name}: {error.message}", error.hint) from error
            found[name] = known[digest]
    return found
