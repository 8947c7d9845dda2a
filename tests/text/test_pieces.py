"""Pieces of a text: appended, generated, decoded, with and without special tokens."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers

from lragent.text.transformers_tokenizer import TransformersTokenizer
from tests.text.builders import EXACT, NOT_SPECIAL, SPACE, SPECIAL, byte_level, words

SETTINGS = settings(max_examples=150, deadline=None)
KINDS = pytest.mark.parametrize("kind", EXACT)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FRAGMENTS = st.sampled_from([*SPECIAL, *NOT_SPECIAL, "<s>", "</s>", "<unk>", SPACE, " ", "the", "<|im_", "end|>", "\n"])


@cache
def reader(kind: str) -> TransformersTokenizer:
    return TransformersTokenizer(EXACT[kind]())


def text_of(tokenizer: TransformersTokenizer, ids: list[int]) -> str:
    return tokenizer.decode_piece(ids, skip_special_tokens=False)


@KINDS
@SETTINGS
@given(pieces=st.lists(TEXT | FRAGMENTS, max_size=6))
def test_a_text_is_its_pieces_joined(kind: str, pieces: list[str]) -> None:
    tokenizer = reader(kind)
    ids = [tokenizer.encode_piece(piece) for piece in pieces]
    assert [text_of(tokenizer, piece) for piece in ids] == pieces
    assert text_of(tokenizer, [index for piece in ids for index in piece]) == "".join(pieces)


@KINDS
@SETTINGS
@given(fragments=st.lists(TEXT | FRAGMENTS, max_size=8))
def test_unparsed_text_holds_no_added_token(kind: str, fragments: list[str]) -> None:
    tokenizer, text = reader(kind), "".join(fragments)
    ids = tokenizer.encode_piece(text, parse_special=False)
    assert text_of(tokenizer, ids) == text
    assert not set(ids) & set(tokenizer.source.added_tokens_decoder)


@KINDS
@SETTINGS
@given(text=TEXT, data=st.data())
def test_a_character_in_two_pieces_is_whole_in_their_text(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = reader(kind)
    ids = tokenizer.encode_piece(text)
    at = data.draw(st.integers(0, len(ids)))
    parts = text_of(tokenizer, ids[:at]), text_of(tokenizer, ids[at:])
    assert text_of(tokenizer, ids[:at] + ids[at:]) == text
    assert "".join(parts) == text or (parts[0].endswith("\ufffd") and parts[1].startswith("\ufffd"))


@KINDS
def test_a_first_space_is_kept_and_none_is_added(kind: str) -> None:
    tokenizer = reader(kind)
    assert tokenizer.encode_piece("the") != tokenizer.encode_piece(" the")
    assert text_of(tokenizer, tokenizer.encode_piece(" the")) == " the"
    assert tokenizer.encode_piece("t")[0] == tokenizer.encode_piece("xt")[-1]
    assert tokenizer.changed_text() is None


@KINDS
def test_added_tokens_are_parsed_unless_told_otherwise(kind: str) -> None:
    tokenizer = reader(kind)
    for content in (*SPECIAL, *NOT_SPECIAL):
        index = tokenizer.source.convert_tokens_to_ids(content)
        assert tokenizer.encode_piece(content) == [index]
        assert index not in tokenizer.encode_piece(f"a{content}b", parse_special=False)
    assert (
        tokenizer.decode_piece(tokenizer.encode_piece("a<|im_end|><think>b"), skip_special_tokens=True) == "a<think>b"
    )


def test_unknown_text_without_byte_tokens_stays_one_unknown_token() -> None:
    """It isn't cut in the search for text that looks like the unknown token."""
    tokenizer = TransformersTokenizer(words())
    assert tokenizer.encode_piece("hello unknownword", parse_special=False) == [1, 0]


def test_runs_of_spaces_that_are_added_tokens_stay_tokens() -> None:
    """They mean the same as text; a model that was trained with them reads them best."""
    held = byte_level()
    held.add_tokens(["    "])
    tokenizer = TransformersTokenizer(held)
    run = held.convert_tokens_to_ids("    ")
    assert run in tokenizer.encode_piece("if x:\n    y", parse_special=False)


@pytest.mark.parametrize(
    ("normalizer", "text", "found"),
    [
        (normalizers.NFC(), "e\u0301", "\u00e9"),
        (normalizers.NFKC(), "\u2460\ufb01", "1fi"),
        (normalizers.Lowercase(), "ABC", "abc"),
        (normalizers.StripAccents(), "e\u0301", "e"),
    ],
)
def test_a_normaliser_that_changes_text_is_recognised(normalizer: object, text: str, found: str) -> None:
    tokenizer = TransformersTokenizer(byte_level(prefix_space=True, normalizer=normalizer))
    assert tokenizer.changed_text() is not None
    assert text_of(tokenizer, tokenizer.encode_piece(text)) == found
    assert text_of(tokenizer, tokenizer.encode_piece("x")) == "x"  # pieces still get no space


@pytest.mark.parametrize(
    "step",
    [normalizers.Strip(), normalizers.Replace(Regex(r"\Aa"), "aa"), normalizers.Replace(Regex(r"\s+$"), "")],
)
def test_steps_at_the_ends_of_a_text_do_not_apply_to_pieces(step: object) -> None:
    tokenizer = TransformersTokenizer(byte_level(normalizer=step))
    assert tokenizer.encode("a ", add_special_tokens=False) != tokenizer.encode_piece("a ")
    assert text_of(tokenizer, tokenizer.encode_piece("a ")) == "a "
    assert tokenizer.changed_text() is None


def test_text_that_can_not_be_joined_is_that_of_transformers() -> None:
    tokenizer = TransformersTokenizer(words())
    ids = tokenizer.encode_piece("Hello World")
    assert text_of(tokenizer, ids) == tokenizer.source.decode(ids) == "hello world"
    assert tokenizer.changed_text() is not None


def test_a_token_that_takes_the_spaces_around_it_changes_text() -> None:
    held = byte_level()
    held.add_tokens([AddedToken("<|end|>", rstrip=True)])
    assert TransformersTokenizer(held).changed_text() == ("a <|end|> b", "a <|end|>b")
