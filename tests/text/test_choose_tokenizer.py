"""The tokenizer of an artifact, where its adapters bring their own."""

from collections.abc import Callable

import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lragent.errors import AdapterError
from lragent.text.choose_tokenizer import ArtifactTokenizer, FoundTokenizer, choose_tokenizer
from lragent.text.same_encoding import difference
from tests.text.builders import byte_level, prefix_space, unigram

NAMES = ("one", "other")


def chosen(
    base: PreTrainedTokenizerFast | None, stops: tuple[int, ...] = (), **adapters: PreTrainedTokenizerFast
) -> ArtifactTokenizer:
    found = {name: FoundTokenizer(held, None) for name, held in adapters.items()}
    return choose_tokenizer(None if base is None else FoundTokenizer(base, None), found, stops, 10_000)


def with_token(content: str, special: bool = True) -> PreTrainedTokenizerFast:
    held = byte_level()
    held.add_tokens([content], special_tokens=special)
    return held


def changed(step: Callable[[PreTrainedTokenizerFast], None]) -> PreTrainedTokenizerFast:
    held = byte_level()
    step(held)
    return held


def test_padding_truncation_and_lengths_do_not_count() -> None:
    other = byte_level()
    other.model_max_length = 16
    other.backend_tokenizer.enable_truncation(16)
    other.backend_tokenizer.enable_padding()
    other.add_special_tokens({"pad_token": "<|pad|>"})
    assert difference(byte_level(), other, NAMES) == difference(other, byte_level(), NAMES) == ""


def _split_digits(held: PreTrainedTokenizerFast) -> None:
    backend = held.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), backend.pre_tokenizer])


def _lower(held: PreTrainedTokenizerFast) -> None:
    held.backend_tokenizer.normalizer = normalizers.Lowercase()


def _one_word(held: PreTrainedTokenizerFast) -> None:
    held.backend_tokenizer.normalizer = normalizers.Replace("town", "city")


@pytest.mark.parametrize("step", [_split_digits, _lower, _one_word])
def test_another_normaliser_or_pre_tokeniser_is_a_difference(step: Callable[[PreTrainedTokenizerFast], None]) -> None:
    assert " becomes " in difference(byte_level(), changed(step), NAMES)


def test_another_token_is_a_difference_and_is_named() -> None:
    found = difference(byte_level(), with_token("<lookup>"), NAMES)
    assert found.startswith("token '<lookup>' is missing in one and id 3")
    assert difference(unigram(), byte_level(), NAMES)
    ids = {token: index for token, index in byte_level().get_vocab().items()}
    assert "Ġthe" in ids
    assert difference(byte_level(), with_token("Ġthe"), NAMES) != ""


def test_files_of_another_form_that_encode_alike_are_the_same() -> None:
    """As other versions of transformers write them."""
    other = byte_level()
    other.backend_tokenizer.normalizer = normalizers.Sequence([])
    assert difference(byte_level(), other, NAMES) == ""
    assert difference(prefix_space("first"), prefix_space("always"), NAMES) != ""  # after added tokens


def test_the_model_s_is_taken_if_the_adapters_are_the_same() -> None:
    base = byte_level()
    text = chosen(base, plan=byte_level(), action=byte_level())
    assert text.found is not None and text.found.source is base
    assert (text.agent_stops, text.templates, text.notes) == ({}, {}, ())
    assert text.stop_token_ids == (base.eos_token_id,)


def test_the_adapters_is_taken_if_they_agree() -> None:
    theirs = with_token("<lookup>")
    text = chosen(byte_level(), plan=theirs, action=with_token("<lookup>"))
    assert text.found is not None and text.found.source is theirs
    assert text.notes[0].startswith("the tokenizer is that of plan, action: token '<lookup>'")
    alone = chosen(None, plan=theirs)
    assert alone.found is not None and alone.found.source is theirs


def test_adapters_that_differ_are_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"adapters plan and action bring tokenizers .* token '<lookup>' is id"):
        chosen(byte_level(), plan=with_token("<lookup>"), action=byte_level())


def test_another_end_of_text_is_the_agent_s_own_stop() -> None:
    other = byte_level()
    other.eos_token = "<|im_end|>"
    end = other.eos_token_id
    text = chosen(byte_level(), plan=other, action=byte_level(), stops=(7,))
    assert text.agent_stops == {"plan": (end,)}
    assert text.stop_token_ids == (7, byte_level().eos_token_id)
    assert any("plan also stops at '<|im_end|>'" in note for note in text.notes)
    assert chosen(byte_level(), plan=other, stops=(end,)).agent_stops == {}


def test_chat_templates_are_the_model_s_and_an_adapter_s_own() -> None:
    base, other, same = byte_level(), with_token("<lookup>"), with_token("<lookup>")
    base.chat_template, other.chat_template, same.chat_template = "base", "own", "base"
    text = chosen(base, plan=other, action=same)
    assert text.found is not None and text.found.source.chat_template == {"default": "base"}
    assert text.templates == {"plan": {"default": "own"}}
    assert other.chat_template == "own"
    bare = chosen(byte_level(), plan=other, action=with_token("<lookup>"))
    assert bare.found is not None and bare.found.source.chat_template == "own"
    assert bare.templates == {}


def test_notes_on_text_that_changes_and_on_tokens_that_the_model_lacks() -> None:
    text = choose_tokenizer(FoundTokenizer(changed(_lower), None), {}, (), 305)
    assert "hello, world" in text.notes[0]
    assert text.notes[1] == "text with '<think>' (id 305) is refused: the model's vocabulary has 305 tokens"
    assert chosen(None).notes == ("no tokenizer was found: trajectories take token ids only",)
