"""The bytes that each token stands for, so that the text of tokens is their bytes joined."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from lragent.text.piece_pipeline import decoder_steps

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Bytes by token id, computed on first use.

    Args:
        backend: a tokenizer for pieces, whose decoder strips nothing.
    """

    def __init__(self, backend: Backend) -> None:
        kinds = {step["type"] for step in decoder_steps(backend)}
        self._backend = backend
        self._added = {index: token.content.encode() for index, token in backend.get_added_tokens_decoder().items()}
        self._letters = _byte_letters() if "ByteLevel" in kinds else {}
        self._byte_tokens = "ByteFallback" in kinds
        self._decoder = backend.decoder or decoders.Fuse()
        self._known: dict[int, bytes] = {}

    def join(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._known[index] if index in self._known else self._learn(index) for index in ids])

    def _learn(self, index: int) -> bytes:
        self._known[index] = found = self._bytes_of(index)
        return found

    def _bytes_of(self, index: int) -> bytes:
        """Bytes of one token; none for an id that the tokenizer doesn't know."""
        if index in self._added:
            return self._added[index]
        token = self._backend.id_to_token(index)
        if token is None:
            return b""
        if self._letters:
            known = all(letter in self._letters for letter in token)
            return bytes(self._letters[letter] for letter in token) if known else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else self._decoder.decode([token]).encode()


def _byte_letters() -> dict[str, int]:
    """Letter -> byte in byte-level vocabularies: printable bytes are themselves, others begin at U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
