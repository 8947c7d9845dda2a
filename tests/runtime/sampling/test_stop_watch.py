import pytest

from lragent.errors import RequestError
from lragent.runtime.sampling.stop_watch import StopWatch
from tests.runtime.toy_tokenizer import EOS, ToyTokenizer, piece_id


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
