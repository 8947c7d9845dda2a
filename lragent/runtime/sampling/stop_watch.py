"""Detects the end of a turn: stop token ids, and stop strings in the growing text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lragent.errors import RequestError
from lragent.runtime.sampling.tokenizer import Tokenizer

# A decoder's replacement for bytes that don't form a character (yet).
_REPLACEMENT = "\ufffd"
# A character has at most four bytes: a longer run of trailing replacements is no incomplete character.
_MOST_PENDING = 4


class StopWatch:
    """Watches the sampled tokens of one turn.

    Text is decoded in a window over the last tokens, up to the last complete character. Stop strings are found across
    token boundaries and in multi-byte text, at a constant cost per token.

    Args:
        tokenizer: needed for stop strings and for text.
        stop: stop strings. A string that is one special token of the tokenizer is also a stop token id.
        stop_token_ids: ids that end the turn.

    Raises:
        RequestError: stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_token_ids: Iterable[int]) -> None:
        if stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer", "Pass tokenizer=... to the engine, or stop_token_ids.")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_ids = set(stop_token_ids)
        if tokenizer is not None:
            for text in stop:
                ids = tokenizer.encode(text, add_special_tokens=False)
                if len(ids) == 1 and ids[0] in tokenizer.special_ids:
                    self._stop_ids.add(ids[0])
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._text = ""
        self._window = 0  # first token of the decoding window
        self._read = 0  # tokens whose text is in `_text`

    def push(self, token: int) -> bool:
        """Adds the next token; True if the turn ends with it."""
        self._ids.append(token)
        if token in self._stop_ids:
            return True
        return bool(self._stop) and self._found_in_new_text()

    def _found_in_new_text(self) -> bool:
        known = self._decode(self._ids[self._window : self._read])
        text = self._decode(self._ids[self._window :])
        pending = len(text) - len(text.rstrip(_REPLACEMENT))
        if 0 < pending < _MOST_PENDING or len(text) <= len(known):
            return False
        before = len(self._text)
        self._text += text[len(known) :]
        self._window, self._read = self._read, len(self._ids)
        return any(self._text.find(stop, max(0, before - self._longest + 1)) >= 0 for stop in self._stop)

    def text(self) -> str:
        """Text of all tokens, without special tokens, up to the first stop string; empty without tokenizer."""
        if self._tokenizer is None:
            return ""
        text = self._decode(self._ids)
        if not any(stop in text for stop in self._stop) and any(stop in self._text for stop in self._stop):
            text = self._text  # the stop string is in the window's text only
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return text[: min(found)] if found else text

    def _decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=True)
