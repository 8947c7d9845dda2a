"""Detects the end of a turn: stop token ids, and stop strings in the growing text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lragent.errors import RequestError
from lragent.text.tokenizer import Tokenizer

# A decoder's replacement for bytes that don't form a character (yet).
_REPLACEMENT = "\ufffd"
# A character has at most four bytes: a longer run of trailing replacements is no incomplete character.
_MOST_PENDING = 4


class StopWatch:
    """Watches the sampled tokens of one turn.

    Text is decoded in a window over the last tokens, up to the last complete character. It holds special tokens, so
    that stop strings are found in them, too, across token boundaries and in multi-byte text, at a constant cost per
    token.

    Args:
        tokenizer: needed for stop strings and for text.
        stop: stop strings; special tokens in them are matched.
        stop_token_ids: ids that end the turn.

    Raises:
        RequestError: stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_token_ids: Iterable[int]) -> None:
        if stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer", "Pass tokenizer=... to the engine, or stop_token_ids.")
        self.stop_reason: str | int | None = None  # the stop string or token id that ended the turn
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_ids = frozenset(stop_token_ids)
        self._special_ids = tokenizer.special_ids if tokenizer is not None else frozenset()
        self._ids: list[int] = []
        # The rest is kept for stop strings only.
        self._text = ""  # special tokens included
        self._special: list[tuple[int, int]] = []  # their places in `_text`
        self._window = 0  # first token of the decoding window
        self._read = 0  # tokens whose text is in `_text`
        self._end: int | None = None  # place of the stop string in `_text`

    def push(self, token: int) -> bool:
        """Adds the next token; True if the turn ends with it."""
        self._ids.append(token)
        if self._stop:
            self._find_in(self._read_on(token))
        if self.stop_reason is None and token in self._stop_ids:
            self.stop_reason = token
        return self.stop_reason is not None

    def text(self) -> str:
        """Text of all tokens, without special tokens, up to the first stop string; empty without tokenizer."""
        if not self._stop:
            return self._decode(self._ids, skip_special_tokens=True)
        text = self._text
        if self._end is None:
            text += self._new_text(len(self._ids))
        shown, start = [], 0
        for place, end in [*self._special, (len(text), len(text))]:
            shown.append(text[start : min(place, len(text) if self._end is None else self._end)])
            start = end
        return "".join(shown)

    def _read_on(self, token: int) -> int:
        """Adds the text of new tokens, up to the last complete character; returns the former length of the text."""
        before = len(self._text)
        if token in self._special_ids:
            self._text += self._new_text(len(self._ids) - 1)
            place = len(self._text)
            self._text += self._decode([token])
            self._special.append((place, len(self._text)))
            self._window = self._read = len(self._ids)
            return before
        text = self._new_text(len(self._ids))
        pending = len(text) - len(text.rstrip(_REPLACEMENT))
        if text and not 0 < pending < _MOST_PENDING:
            self._text += text
            self._window, self._read = self._read, len(self._ids)
        return before

    def _new_text(self, end: int) -> str:
        """Text of the tokens before `end` that isn't in `_text` yet."""
        known = self._decode(self._ids[self._window : self._read])
        return self._decode(self._ids[self._window : end])[len(known) :]

    def _find_in(self, start: int) -> None:
        """Looks for a stop string that ends after `start`; the first one in the text ends the turn."""
        found = [(self._text.find(stop, max(0, start - len(stop) + 1)), stop) for stop in self._stop]
        places = [place for place in found if place[0] >= 0]
        if places:
            self._end, self.stop_reason = min(places, key=lambda place: place[0])

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode_piece(ids, skip_special_tokens)
