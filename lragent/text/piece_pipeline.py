"""A fast tokenizer for pieces: the same model and tokens, but nothing is put before a text and nothing is stripped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

# Parts of a pipeline that may hold others.
_LISTS = ("normalizers", "pretokenizers", "decoders")
# Settings by which a pre-tokeniser puts a space before the text, or a decoder strips it.
_NO_PREFIX: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


def rebuilt(backend: Backend, added: Sequence[AddedToken], pieces: bool) -> Backend:
    """A tokenizer with the same model, which both share, and without post-processor, truncation and padding.

    Args:
        added: its added tokens, in the order of their ids.
        pieces: True: no prefix is put before a text, and nothing is stripped when it is decoded.
    """
    shell = Backend(BPE())
    shell.normalizer, shell.pre_tokenizer, shell.decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    if pieces:
        parts = json.loads(shell.to_str())
        shell = Backend.from_str(json.dumps({name: without_prefix(part) for name, part in parts.items()}))
    made = Backend(backend.model)
    made.normalizer, made.pre_tokenizer, made.decoder = shell.normalizer, shell.pre_tokenizer, shell.decoder
    made.add_tokens(list(added))
    made.encode_special_tokens = backend.encode_special_tokens
    return made


def added_tokens(backend: Backend) -> list[AddedToken]:
    """Added tokens in the order of their ids."""
    return [token for _, token in sorted(backend.get_added_tokens_decoder().items())]


def without_prefix(part: Any) -> Any:
    """A part of a tokenizer's JSON without steps that add to, or cut from, the beginning or end of a text."""
    if not isinstance(part, dict) or "type" not in part:
        return part
    if part["type"] in ("Prepend", "Strip") or (part["type"] == "Replace" and _anchored(part["pattern"])):
        return None
    lists = {
        name: [kept for inner in part[name] if (kept := without_prefix(inner)) is not None]
        for name in _LISTS
        if name in part
    }
    return {**part, **_NO_PREFIX.get(part["type"], {}), **lists}


def _anchored(pattern: dict[str, str]) -> bool:
    """True for a pattern that matches at the beginning or end of a text only."""
    regex = pattern.get("Regex", "")
    return regex.startswith(("^", r"\A")) or (regex.endswith(("$", r"\z", r"\Z")) and not regex.endswith(r"\$"))


def decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    """Steps of a tokenizer's decoder as JSON, in order; empty if it has none."""
    shell = Backend(BPE())
    shell.decoder = backend.decoder
    decoder = json.loads(shell.to_str())["decoder"]
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
