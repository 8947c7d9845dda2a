"""Compares what two tokenizers encode. Padding, truncation, chat templates and lengths don't count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lragent.text.piece_pipeline import added_tokens, rebuilt
from lragent.text.probes import PROBES
from lragent.text.transformers_tokenizer import TransformersTokenizer

_TOKENS_PER_TEXT = 512


def difference(one: Any, other: Any, names: tuple[str, str]) -> str:
    """The first difference between what two transformers tokenizers encode; "" if there is none.

    A token for padding that only one of them has doesn't count.

    Args:
        names: their names, for the text.
    """
    padding = _padding_of_one(one, other)
    changed = _changed_token(one, other, padding, names)
    if changed or _equal_files(one, other):
        return changed
    for text in _texts(one, other, padding):
        left, right = (each(text, add_special_tokens=False, verbose=False)["input_ids"] for each in (one, other))
        if left != right:
            at = next(n for n in range(len(left) + 1) if left[: n + 1] != right[: n + 1])
            found = f"{left[at : at + 4]} in {names[0]} and {right[at : at + 4]} in {names[1]}"
            return f"{one.decode(left[at : at + 4])!a} becomes {found}"
    return ""


def _padding_of_one(one: Any, other: Any) -> set[str]:
    """Padding tokens that only one of two tokenizers has."""
    return {
        each.pad_token
        for each, against in ((one, other), (other, one))
        if each.pad_token is not None and each.pad_token not in against.get_vocab()
    }


def _changed_token(one: Any, other: Any, ignored: set[str], names: tuple[str, str]) -> str:
    left, right = one.get_vocab(), other.get_vocab()
    tokens = {token for token in {*left, *right} - ignored if left.get(token) != right.get(token)}
    if not tokens:
        return ""
    token = min(tokens, key=lambda token: (left.get(token, right.get(token)), token))
    ids = [f"id {index}" if index is not None else "missing" for index in (left.get(token), right.get(token))]
    return f"token {token!r} is {ids[0]} in {names[0]} and {ids[1]} in {names[1]}"


def _equal_files(one: Any, other: Any) -> bool:
    """True if two fast tokenizers have equal models, added tokens, normalisers and pre-tokenisers."""
    if not (one.is_fast and other.is_fast):
        return False
    texts = [
        rebuilt(each.backend_tokenizer, added_tokens(each.backend_tokenizer), pieces=False).to_str()
        for each in (one, other)
    ]
    return texts[0] == texts[1]


def _texts(one: Any, other: Any, ignored: set[str]) -> Iterator[str]:
    """Probes, added tokens of both, and every token of the vocabulary as text."""
    yield from PROBES
    for tokenizer in (one, other):
        contents = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in ignored]
        yield from (between.join(contents) for between in ("x", " x "))
    pieces = TransformersTokenizer(one)
    ids = sorted(index for token, index in one.get_vocab().items() if token not in ignored)
    for start in range(0, len(ids), _TOKENS_PER_TEXT):
        yield " ".join(pieces.decode_piece([index], False) for index in ids[start : start + _TOKENS_PER_TEXT])
