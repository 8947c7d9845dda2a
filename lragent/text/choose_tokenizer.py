"""Chooses an artifact's tokenizer: the model's, or the one that its adapters were trained with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.errors import AdapterError
from lragent.text.same_encoding import difference
from lragent.text.transformers_tokenizer import Templates, TransformersTokenizer, chat_templates


@dataclass(frozen=True)
class FoundTokenizer:
    """A transformers tokenizer and the folder that it was read from, None for one in memory or in a GGUF file."""

    source: Any
    folder: Path | None


@dataclass(frozen=True)
class ArtifactTokenizer:
    """An artifact's tokenizer, and each agent's end of text and chat templates.

    Args:
        found: the tokenizer; None if neither the model nor an adapter has one.
        stop_token_ids: the model's own stop tokens, and the end of text of its tokenizer.
        agent_stops: agent -> ends of text of its adapter's tokenizer that differ from those of the model.
        templates: agent -> chat templates of its adapter's tokenizer, where they differ from the artifact's.
        notes: sentences for the report of a conversion.
    """

    found: FoundTokenizer | None
    stop_token_ids: tuple[int, ...]
    agent_stops: Mapping[str, tuple[int, ...]]
    templates: Mapping[str, Templates]
    notes: tuple[str, ...]


def choose_tokenizer(
    base: FoundTokenizer | None, adapters: Mapping[str, FoundTokenizer], stops: tuple[int, ...], vocab_size: int
) -> ArtifactTokenizer:
    """The tokenizer of an artifact.

    If adapters bring tokenizers and these encode alike, theirs is taken, and otherwise the model's. The chat templates
    are the model's, if it has any.

    Args:
        adapters: tokenizers by agent, of adapters that bring one.
        stops: stop tokens of the model's config.
        vocab_size: number of tokens of the model.

    Raises:
        AdapterError: two adapters bring tokenizers that encode differently.
    """
    if adapters:
        _require_same(adapters)
    chosen, note = _chosen(base, adapters)
    if chosen is None:
        return ArtifactTokenizer(None, stops, {}, {}, (note,))
    stops = (*stops, *(end for end in _end_of_text(base) if end not in stops))
    templates = (chat_templates(base.source) if base else {}) or chat_templates(chosen.source)
    own_stops = {
        name: _end_of_text(found) for name, found in adapters.items() if not set(_end_of_text(found)) <= set(stops)
    }
    own_templates = {
        name: own for name, found in adapters.items() if (own := chat_templates(found.source)) and own != templates
    }
    notes = [*([note] if note else ()), *_agent_notes(chosen.source, own_stops, own_templates)]
    notes += _text_notes(chosen.source, vocab_size)
    if chat_templates(chosen.source) != templates:
        source = copy.copy(chosen.source)
        source.chat_template = templates
        chosen = FoundTokenizer(source, chosen.folder)
    return ArtifactTokenizer(chosen, stops, own_stops, own_templates, tuple(notes))


def _chosen(base: FoundTokenizer | None, adapters: Mapping[str, FoundTokenizer]) -> tuple[FoundTokenizer | None, str]:
    """The tokenizer, and a sentence if it isn't the model's."""
    for name, theirs in adapters.items():
        taken = f"the tokenizer is that of {', '.join(adapters)}"
        if base is None:
            return theirs, taken
        changed = difference(theirs.source, base.source, (f"that of {name}", "the model's"))
        return (theirs, f"{taken}: {changed}") if changed else (base, "")
    return base, "" if base else "no tokenizer was found: trajectories take token ids only"


def _end_of_text(found: FoundTokenizer | None) -> tuple[int, ...]:
    end = None if found is None else found.source.eos_token_id
    return () if end is None else (int(end),)


def _require_same(adapters: Mapping[str, FoundTokenizer]) -> None:
    (first, found), *others = adapters.items()
    for name, other in others:
        if other.source is found.source:
            continue
        changed = difference(found.source, other.source, (first, name))
        if changed:
            raise AdapterError(
                f"adapters {first} and {name} bring tokenizers that encode differently: {changed}",
                "Train them with one tokenizer. If one only adds tokens, remove the other's files from its folder.",
            )


def _agent_notes(
    source: Any, stops: Mapping[str, tuple[int, ...]], templates: Mapping[str, Templates]
) -> Iterator[str]:
    for name, ids in stops.items():
        yield f"{name} also stops at {source.convert_ids_to_tokens(ids[0])!r}, the end of text of its own tokenizer"
    if templates:
        yield f"chat templates of their own: {', '.join(templates)}"


def _text_notes(source: Any, vocab_size: int) -> Iterator[str]:
    changed = TransformersTokenizer(source).changed_text()
    if changed is not None:
        yield f"the tokenizer changes some text, which then reads as it does in transformers: {_shown(*changed)}"
    beyond = {index: token for token, index in source.get_vocab().items() if index >= vocab_size}
    if beyond:
        first = min(beyond)
        others = f" or {len(beyond) - 1} other tokens" if len(beyond) > 1 else ""
        yield (
            f"text with {beyond[first]!r} (id {first}){others} is refused: "
            f"the model's vocabulary has {vocab_size} tokens"
        )


def _shown(text: str, found: str) -> str:
    return f"{text!a} becomes {found!a}"
