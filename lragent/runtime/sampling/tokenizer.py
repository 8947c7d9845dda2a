"""Text to token ids and back: the interface that the runtime needs, and its form over the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as FastTokenizer

from lragent.errors import UserError


class Tokenizer(Protocol):
    """Interface of a tokenizer that the runtime needs."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode(..., skip_special_tokens=True)` leaves out."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class TokenizerFile:
    """A `tokenizer.json`, read without transformers.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing or can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(
                f"tokenizer {path}: {error}", "Expected a tokenizer.json as saved by `tokenizer.save_pretrained`."
            ) from error
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
