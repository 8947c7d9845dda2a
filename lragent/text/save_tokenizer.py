"""Saves a tokenizer to a folder from which transformers loads the same one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lragent.errors import UserError
from lragent.text.load_tokenizer import (
    CHAT_TEMPLATES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    load_tokenizer,
    tokenizer_files,
)
from lragent.text.probes import PROBES
from lragent.text.same_encoding import difference
from lragent.text.transformers_tokenizer import chat_templates


def save_tokenizer(source: Any, target: Path, original: Path | None = None) -> None:
    """Saves a transformers tokenizer, with its chat templates, and checks that it is loaded again as it was.

    If what transformers saves is loaded as another tokenizer, its original files are copied instead.

    Args:
        target: a folder, which is made.
        original: the folder from which it was loaded, or None.

    Raises:
        UserError: a tokenizer that is loaded again encodes or decodes otherwise.
    """
    ways: list[Callable[[], None]] = [partial(_save, source, target)]
    if original is not None:
        ways.append(partial(_copy, original, target))
    for way in ways:
        way()
        changed = _change(source, target)
        if not changed:
            return
        shutil.rmtree(target)
    raise UserError(f"the tokenizer can't be saved: loaded again, it {changed}", "Give a folder with its files.")


def _save(source: Any, target: Path) -> None:
    source.save_pretrained(target)
    file = target / TOKENIZER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # its code isn't saved
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _copy(original: Path, target: Path) -> None:
    """Copies tokenizer files, and the model's config, which decides about the tokenizer's class."""
    target.mkdir()
    for file in tokenizer_files(original, (*TOKENIZER_FILES, "config.json")):
        shutil.copyfile(file, target / file.name)
    if (original / CHAT_TEMPLATES).is_dir():
        shutil.copytree(original / CHAT_TEMPLATES, target / CHAT_TEMPLATES)


def _change(source: Any, target: Path) -> str:
    """The first difference between a tokenizer and the one loaded from a folder; "" if there is none."""
    try:
        loaded = load_tokenizer(target)
    except UserError as error:
        return f"fails: {error.message}"
    if chat_templates(loaded) != chat_templates(source):
        return "has other chat templates"
    if set(loaded.all_special_ids) != set(source.all_special_ids) or loaded.eos_token_id != source.eos_token_id:
        return "has other special tokens"
    added = " ".join(token.content for token in source.added_tokens_decoder.values())
    other = difference(source, loaded, ("the given one", "the saved one"))
    if other:
        return f"encodes otherwise: {other}"
    for probe in (*PROBES, added):
        for special in (True, False):
            ids, found = (
                each(probe, add_special_tokens=special, verbose=False)["input_ids"] for each in (source, loaded)
            )
            if ids != found:
                return f"encodes {probe!a} as {found[:8]}, not {ids[:8]}"
            texts = [each.decode(ids, skip_special_tokens=special) for each in (source, loaded)]
            if texts[0] != texts[1]:
                return f"decodes {ids[:8]} as {texts[1]!a}, not {texts[0]!a}"
    return ""
