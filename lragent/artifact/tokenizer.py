"""The tokenizer in an artifact."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from lragent.artifact.directory import Artifact
from lragent.errors import ModelError, RequestError, UserError, shortened
from lragent.loading.checkpoint import find_checkpoint
from lragent.runtime.sampling.tokenizer import Tokenizer, TokenizerFile

TOKENIZER = "tokenizer"  # folder in an artifact
FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (FAST_TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")


def write_tokenizer(source: str | None, directory: Path) -> bool:
    """Saves the model's tokenizer; returns False if it has none.

    A `tokenizer.json` is copied with the files that belong to it. Reading and saving it again could change it, because
    transformers rebuilds some tokenizers from their vocabulary. Older files, and a tokenizer inside a GGUF file, are
    converted to a `tokenizer.json`.

    Raises:
        ModelError: there are tokenizer files, but they can't be read.
    """
    checkpoint = None if source is None else find_checkpoint(Path(source))
    if checkpoint is None:
        return False
    folder, target = checkpoint.directory, directory / TOKENIZER
    if not any((folder / name).is_file() for name in (TOKENIZER_CONFIG, FAST_TOKENIZER)) and not checkpoint.gguf:
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
        remedy = (
            f"Put the model's {FAST_TOKENIZER} beside it." if checkpoint.gguf else "Repair it, or remove its files."
        )
        reason = error.message if isinstance(error, UserError) else shortened(error)
        raise ModelError(f"the tokenizer in {source} can't be read: {reason}", remedy) from error
    return (target / FAST_TOKENIZER).is_file()


def tokenizer_of(artifact: Artifact) -> Tokenizer | None:
    """The artifact's tokenizer; None if it has none."""
    if not artifact.manifest.tokenizer:
        return None
    return TokenizerFile(artifact.directory / TOKENIZER / FAST_TOKENIZER)


def tokenizer_from(source: Any) -> Tokenizer | None:
    """A tokenizer from a directory, or from a live transformers tokenizer (anything with `save_pretrained`)."""
    if source is None:
        return None
    if isinstance(source, (str, Path)):
        file = Path(source) / FAST_TOKENIZER
        if not file.is_file():
            raise RequestError(f"no {FAST_TOKENIZER} in {source}", "Give a folder saved with save_pretrained.")
        return TokenizerFile(file)
    with tempfile.TemporaryDirectory() as scratch:
        source.save_pretrained(scratch)
        return TokenizerFile(Path(scratch) / FAST_TOKENIZER)
