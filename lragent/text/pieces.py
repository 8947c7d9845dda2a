"""Encodes and decodes pieces of a text with a fast tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import pairwise

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lragent.text.piece_pipeline import added_tokens, rebuilt
from lragent.text.probes import PROBES
from lragent.text.token_bytes import TokenBytes

# The sign that stands for a space in many vocabularies, so that the sign itself can only be written as bytes.
_SPACE = "\u2581"


class Pieces:
    """A fast tokenizer's copies for pieces. They share its vocabulary.

    Args:
        backend: the tokenizer.
        unknown: id in place of text that the vocabulary lacks, or None.
    """

    def __init__(self, backend: Backend, unknown: int | None) -> None:
        self._backend, self._unknown = backend, unknown
        self._parsing = rebuilt(backend, added_tokens(backend), pieces=True)
        self._bytes = TokenBytes(self._parsing)
        self._space_ids = self._ids_of_space_sign()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a piece; see `Tokenizer.encode_piece`."""
        if not self._space_ids or _SPACE not in text:
            return self._encode(text, parse_special)
        first, *others = text.split(_SPACE)
        ids = self._encode(first, parse_special)
        for part in others:
            ids += [*self._space_ids, *self._encode(part, parse_special)]
        return ids

    def decode(self, ids: Sequence[int], skipped: Collection[int]) -> str:
        """Text of a piece without the tokens `skipped`."""
        kept = [index for index in ids if index not in skipped] if skipped else ids
        return self._bytes.join(kept).decode(errors="replace")

    def fits(self, whole_text: Callable[[list[int]], str]) -> bool:
        """True if pieces read as transformers decodes them, apart from a first space that it strips.

        Args:
            whole_text: transformers' text of ids.
        """
        if self._parsing.get_added_tokens_decoder().keys() != self._backend.get_added_tokens_decoder().keys():
            return False
        for probe in PROBES:
            ids = self._encode(probe, parse_special=True)
            text = self.decode(ids, ())
            if whole_text(ids) not in (text, text.removeprefix(" ")):
                return False
        return True

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if parse_special:
            return list(self._parsing.encode(text, add_special_tokens=False).ids)
        return self._plain.encode(text)

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self._backend, self._unknown, pieces=True)

    def _ids_of_space_sign(self) -> list[int]:
        """Byte tokens of the sign that stands for a space; empty if it needs none, or there are none."""
        if self.decode(self._encode(_SPACE, parse_special=True), ()) == _SPACE:
            return []
        ids = [self._parsing.token_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        known = [index for index in ids if index is not None]
        return known if self.decode(known, ()) == _SPACE else []


class PlainText:
    """Encodes text in which nothing is an added token.

    Args:
        backend: a fast tokenizer.
        unknown: id in place of text that the vocabulary lacks, or None.
        pieces: see `rebuilt`.
    """

    def __init__(self, backend: Backend, unknown: int | None, pieces: bool) -> None:
        added = backend.get_added_tokens_decoder()
        kept = {index: token for index, token in sorted(added.items()) if _is_space(token)}
        self._backend = rebuilt(backend, list(kept.values()), pieces)
        # Without the others, tokens that are kept have other ids.
        self._ids = dict(zip(sorted(self._backend.get_added_tokens_decoder()), kept, strict=True))
        self._added = {index: token.content for index, token in added.items() if index not in kept}
        self._unknown = unknown

    def encode(self, text: str) -> list[int]:
        """Ids without added tokens; text that the model itself makes one of is cut in two.

        A token of a single character can't be cut, and stays.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = [self._ids.get(index, index) for index in encoding.ids]
        cuts = [
            (start + end) // 2
            for index, (start, end) in zip(ids, encoding.offsets, strict=True)
            if index in self._added and end - start > 1 and self._is_written(index, text[start:end])
        ]
        if not cuts:
            return ids
        borders = [0, *cuts, len(text)]
        parts = [text[start:end] for start, end in pairwise(borders)]
        return [index for part in parts for index in self.encode(part)]

    def _is_written(self, index: int, text: str) -> bool:
        """False for the unknown token in place of text that the vocabulary lacks."""
        return index != self._unknown or text == self._added[index]


def _is_space(token: AddedToken) -> bool:
    """True for an added token that stands for spaces or line breaks: it means the same as text."""
    return not token.special and token.content.replace(_SPACE, " ").isspace()
