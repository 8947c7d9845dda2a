"""The interface of a tokenizer that the runtime needs.

A *whole text* begins a trajectory and is encoded as transformers does. A *piece* is appended to one: nothing is put in
front of it or cut from it, so that the text of a trajectory is its pieces joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding with `skip_special_tokens=True` leaves out."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a whole text. Special tokens that are put in front, such as a BOS, aren't put there twice."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of ids that are a whole text."""
        ...

    def encode_piece(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of a piece.

        Args:
            parse_special: False: text that looks like an added token (special or not) is ordinary text.
        """
        ...

    def decode_piece(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of ids that are a piece; U+FFFD stands for bytes that are no complete character."""
        ...
