"""The written models are what other tests take them for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.models import EOS, KINDS, VOCAB, write_model

TEXT = "Two  spaces, a\nline: 12 {ok}."


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_a_character_however_the_tokenizer_is_read(kind: str, tmp_path: Path) -> None:
    model_dir = write_model(tmp_path, kind).model_dir
    expected = [95 if c == "\n" else ord(c) - 32 for c in TEXT]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer(TEXT)["input_ids"] == expected
    assert Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(TEXT).ids == expected
    assert tokenizer.decode(expected) == TEXT
    assert (len(tokenizer), tokenizer.eos_token_id) == (VOCAB, EOS)


def test_one_a_needs_equal_ranks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="equal ranks"):
        write_model(tmp_path, "llama", shared_a=True)
