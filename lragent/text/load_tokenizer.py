"""Loads a tokenizer as transformers' AutoTokenizer does, without truncation and padding, and runs none of its code."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lragent.errors import UserError, shortened

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that hold a vocabulary, and the file by which a tokenizer without vocabulary is known.
_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
)
# Files that may be a part of a tokenizer.
TOKENIZER_FILES = (*_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja", "bpe.codes")
CHAT_TEMPLATES = "additional_chat_templates"
_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}
_RANKED = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")  # a line of a tiktoken file: token in base64, and its rank


def tokenizer_files(folder: Path, patterns: tuple[str, ...] = _FILES) -> list[Path]:
    """Tokenizer files in a folder; empty if it holds no tokenizer."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def load_tokenizer(folder: Path, gguf: str | None = None, config: Any = None) -> Any:
    """The tokenizer in a folder, as transformers loads it.

    Args:
        gguf: name of a GGUF file in the folder that holds the tokenizer.
        config: the model's config, which decides about the tokenizer's class, for a folder without config.json.

    Raises:
        UserError: the tokenizer can't be read, needs a package that isn't installed or code of its own, or can't encode
            text.
    """
    from transformers import AutoTokenizer

    arguments: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    if config is not None and gguf is None and not (folder / "config.json").is_file():
        arguments["config"] = config
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **arguments)
    except Exception as error:  # of any kind: tokenizers are read by many classes
        raise _reason(folder, gguf, error) from error
    whole_texts(loaded)
    if not set(loaded.get_vocab().values()) - {*loaded.all_special_ids, *loaded.added_tokens_decoder}:
        raise UserError(f"the tokenizer in {folder} has no vocabulary", "Add its files, or remove all of them.")
    return loaded


def live_tokenizer(source: Any) -> Any:
    """A copy of a transformers tokenizer in memory, without its truncation and padding.

    Raises:
        UserError: it is no transformers tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(source, PreTrainedTokenizerBase):
        raise UserError(
            f"tokenizer is a {type(source).__name__}", "Give a transformers tokenizer, or a folder with its files."
        )
    copied = copy.deepcopy(source)
    whole_texts(copied)
    return copied


def whole_texts(loaded: Any) -> None:
    """Turns off truncation and padding that a trainer has left in a tokenizer."""
    if loaded.is_fast:
        loaded.backend_tokenizer.no_truncation()
        loaded.backend_tokenizer.no_padding()


def _reason(folder: Path, gguf: str | None, error: Exception) -> UserError:
    if gguf is not None:
        return UserError(
            f"the tokenizer in {folder / gguf} can't be read: {shortened(error)}",
            "Put the model's tokenizer.json beside it.",
        )
    if _own_code(folder):
        return UserError(
            f"the tokenizer in {folder} is Python code of its own (auto_map in {TOKENIZER_CONFIG}), which is never run",
            "Save it as a tokenizer.json, or use a model of a type that transformers has.",
        )
    missing = sorted(set(_missing_packages(folder)))
    if missing:
        names = " and ".join(missing)
        return UserError(
            f"the tokenizer in {folder} needs {names}, not installed here", f"pip install {' '.join(missing)}"
        )
    return UserError(f"the tokenizer in {folder} can't be read: {shortened(error)}", "Repair it, or remove its files.")


def _own_code(folder: Path) -> bool:
    file = folder / TOKENIZER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except ValueError:
        return False
    return isinstance(config, dict) and "auto_map" in config


def _missing_packages(folder: Path) -> Iterator[str]:
    """Packages for reading the vocabulary files of a folder that can't be imported."""
    for file in tokenizer_files(folder, ("*.model", "*.model.v*", "*.tiktoken")):
        with file.open("rb") as opened:
            ranked = _RANKED.match(opened.readline())
        for package in ("tiktoken",) if ranked else ("sentencepiece", "protobuf"):
            try:
                import_module(_PACKAGES[package])
            except ImportError:
                yield package
