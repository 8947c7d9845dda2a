from collections.abc import Sequence

import pytest

from lragent.errors import RequestError
from lragent.runtime.sampling.stop_watch import StopWatch
from lragent.text.transformers_tokenizer import TransformersTokenizer
from tests.runtime.toy_tokenizer import EOS, ToyTokenizer, piece_id
from tests.text.builders import EXACT


def feed(stop: list[str], pieces: list[bytes], stop_ids: tuple[int, ...] = ()) -> tuple[int | None, str]:
    """Index of the piece that stops the turn, and the turn's text."""
    watch = StopWatch(ToyTokenizer(), stop, stop_ids)
    for index, piece in enumerate(pieces):
        if watch.push(EOS if piece == b"<eos>" else piece_id(piece)):
            return index, watch.text()
    return None, watch.text()


def test_stop_string_inside_one_token_is_cut_off() -> None:
    assert feed(["STOP"], [b"a", b"STOP", b"b"]) == (1, "a")


def test_stop_string_across_tokens() -> None:
    assert feed(["STOP"], [b"a", b"ST", b"OPab"]) == (2, "a")
    assert feed(["aSTOPa"], [b"ab", b"a", b"ST", b"OPab"]) == (3, "ab")


def test_stop_string_around_a_character_in_two_tokens() -> None:
    euro = "€"
    assert feed([euro], [b"a", b"\xe2\x82", b"\xac"]) == (2, "a")
    assert feed([f"a{euro}S"], [b"b", b"a", b"\xe2\x82", b"\xacST"]) == (3, "b")


def test_half_a_character_never_stops_a_turn() -> None:
    assert feed(["\ufffd"], [b"a", b"\xe2\x82", b"\xac"]) == (None, "a€")


def test_the_first_of_several_stop_strings_cuts() -> None:
    assert feed(["ab", "STOP"], [b"b", b"ST", b"OPab"]) == (2, "b")


def test_stop_token_ids_stay_out_of_the_text_only_if_special() -> None:
    assert feed([], [b"a", b"<eos>"], (EOS,)) == (1, "a")
    assert feed([], [b"a", b"b"], (piece_id(b"b"),)) == (1, "ab")


def test_a_special_token_works_as_stop_string() -> None:
    assert feed(["<eos>"], [b"a", b"<eos>"]) == (1, "a")


def test_every_split_of_a_text_stops_at_the_same_place() -> None:
    for stop in ("\n\n", "c\n", "\n"):
        for pieces in ([b"a", b"b", b"c", b"\n", b"\n"], [b"ab", b"c", b"\n\n"]):
            _, text = feed([stop], pieces)
            assert text == "abc\n\n".split(stop)[0]


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        StopWatch(None, ["x"], ())
    assert StopWatch(None, [], (3,)).push(3)


def test_the_reason_is_the_string_or_token_that_ended_the_turn() -> None:
    for stop, ids, pieces, reason in (
        (["zz", "STOP"], (), [b"a", b"ST", b"OPab"], "STOP"),
        (["b", "STOP"], (), [b"STOP", b"b"], "STOP"),
        ([], (EOS,), [b"a", b"<eos>"], EOS),
        (["<eos>"], (EOS,), [b"a", b"<eos>"], "<eos>"),
        (["zz"], (EOS,), [b"a", b"b"], None),
    ):
        watch = StopWatch(ToyTokenizer(), stop, ids)
        for piece in pieces:
            if watch.push(EOS if piece == b"<eos>" else piece_id(piece)):
                break
        assert watch.stop_reason == reason


def test_a_stop_string_of_special_tokens_and_text() -> None:
    pieces = [b"a", b"<eos>", b"a", b"<eos>", b"a", b"b"]
    assert feed(["<eos>ab"], pieces) == (5, "aa")
    assert feed(["a<eos>a"], pieces) == (2, "")
    assert feed(["<eos><eos>"], pieces) == (None, "aaab")


def test_half_a_character_before_a_special_token() -> None:
    assert feed(["<eos>b"], [b"a", b"\xe2\x82", b"<eos>", b"b"]) == (3, "a\ufffd")
    assert feed(["zz"], [b"a", b"<eos>", b"\xe2\x82"]) == (None, "a\ufffd")


@pytest.mark.parametrize("kind", EXACT)
def test_a_stop_string_at_the_first_space_of_a_turn(kind: str) -> None:
    tokenizer = TransformersTokenizer(EXACT[kind]())
    for stop, text in ((" the", ""), (" the<|im_start|>user", ""), ("<|im_start|>user", " the")):
        watch = StopWatch(tokenizer, [stop], ())
        ids = tokenizer.encode_piece(" the<|im_start|>user said")
        end = next(index for index, token in enumerate(ids) if watch.push(token))
        written = tokenizer.decode_piece(ids[: end + 1], skip_special_tokens=False)
        assert (watch.text(), watch.stop_reason) == (text, stop)
        assert stop in written and stop not in tokenizer.decode_piece(ids[:end], skip_special_tokens=False)


def test_the_cost_of_a_token_does_not_grow() -> None:
    """Tokens decoded for each of 2,000 tokens stay few."""
    decoded: list[int] = []

    class Counting(ToyTokenizer):
        def decode_piece(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
            decoded.append(len(ids))
            return super().decode_piece(ids, skip_special_tokens)

    watch = StopWatch(Counting(), ["STOP"], ())
    for _ in range(500):
        for piece in (b"a", b"\xe2\x82", b"\xac", b"<eos>"):
            watch.push(EOS if piece == b"<eos>" else piece_id(piece))
    assert max(decoded) <= 5
    assert len(decoded) <= 3 * 2000
