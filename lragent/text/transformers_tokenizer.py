"""A tokenizer of transformers, fast or Python-only, as the runtime needs it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from lragent.program.agent import BASE
from lragent.text.pieces import Pieces, PlainText
from lragent.text.probes import PROBES

Templates = Mapping[str, str]  # name of a chat template -> its text
_PLAIN = "a"


class TransformersTokenizer:
    """Encodes and decodes as transformers does, and pieces as `lragent.text.tokenizer` describes.

    Pieces of a tokenizer whose text can't be joined (words separated by spaces that no token holds) are encoded and
    decoded as whole texts; `changed_text` then says so.

    Args:
        source: the transformers tokenizer, with truncation and padding off.
        templates: chat templates of agents that have their own, by agent.
    """

    def __init__(self, source: Any, templates: Mapping[str, Templates] = MappingProxyType({})) -> None:
        self.source = source
        self.templates = templates

    @cached_property
    def special_ids(self) -> frozenset[int]:
        added = self.source.added_tokens_decoder
        return frozenset(self.source.all_special_ids) | {index for index, token in added.items() if token.special}

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self.source.eos_token_id
        return found

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._ids(text, add_special_tokens)
        lead = self._lead
        twice = bool(lead) and add_special_tokens and ids[: len(lead)] == ids[len(lead) : 2 * len(lead)] == lead
        return ids[len(lead) :] if twice else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self.source.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_piece(self, text: str, parse_special: bool = True) -> list[int]:
        if self._pieces is not None:
            return self._pieces.encode(text, parse_special)
        if parse_special:
            return self._ids(text, add_special_tokens=False)
        if self.source.is_fast:
            return self._plain_text.encode(text)
        parts = self._cuts.split(text) if self._cuts else [text]
        return [index for part in parts if part for index in self._ids(part, add_special_tokens=False)]

    def decode_piece(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        if self._pieces is None:
            return self.decode(ids, skip_special_tokens)
        return self._pieces.decode(ids, self.special_ids if skip_special_tokens else ())

    def render_chat(self, messages: Sequence[Mapping[str, Any]], agent: str = BASE, **options: Any) -> str:
        """Messages as text, by the agent's own chat template if it has one.

        Args:
            options: see `apply_chat_template` of transformers, such as add_generation_prompt, tools, chat_template.
        """
        speaker = self.source
        if agent in self.templates:
            speaker = copy.copy(self.source)
            speaker.chat_template = dict(self.templates[agent])
        return str(speaker.apply_chat_template(list(messages), tokenize=False, **options))

    def changed_text(self) -> tuple[str, str] | None:
        """A text that doesn't come back from its ids, and what comes back; None if all probes do.

        A normaliser (of case, accents or width), characters that the vocabulary lacks, and tokens that take the spaces
        around them change text.
        """
        eager = [token.content for token in self.source.added_tokens_decoder.values() if token.lstrip or token.rstrip]
        for probe in (*PROBES, *(f"a {content} b" for content in eager)):
            found = self.decode_piece(self.encode_piece(probe), skip_special_tokens=False)
            if found != probe:
                return probe, found
        return None

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.source(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    @cached_property
    def _lead(self) -> list[int]:
        """Ids that the tokenizer puts before a whole text."""
        whole, plain = self._ids(_PLAIN, True), self._ids(_PLAIN, False)
        at = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        return whole[:at]

    @cached_property
    def _pieces(self) -> Pieces | None:
        if not self.source.is_fast:
            return None
        pieces = Pieces(self.source.backend_tokenizer, self.source.unk_token_id)
        return pieces if pieces.fits(lambda ids: self.decode(ids, skip_special_tokens=False)) else None

    @cached_property
    def _plain_text(self) -> PlainText:
        return PlainText(self.source.backend_tokenizer, self.source.unk_token_id, pieces=False)

    @cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        """Places after the first character of every added token in a text."""
        contents = {token.content for token in self.source.added_tokens_decoder.values() if len(token.content) > 1}
        if not contents:
            return None
        return re.compile("|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in sorted(contents)))


def chat_templates(source: Any) -> dict[str, str]:
    """Chat templates of a transformers tokenizer by name."""
    found = source.chat_template
    if found is None:
        return {}
    return {"default": found} if isinstance(found, str) else dict(found)
