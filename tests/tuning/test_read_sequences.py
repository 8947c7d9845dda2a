"""Turns that count, turns that are only read, and files that are not of this model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lragent.errors import TaskFileError
from lragent.training.turn_sequence import Turn
from lragent.tuning.examples import examples_of
from lragent.tuning.options import TuneOptions
from lragent.tuning.read_sequences import Accepted, read_scored_sequences
from tests.tuning.sequences import ACTION, DIGESTS, PLAN, line, trajectory, write

ACCEPTED = Accepted(DIGESTS, vocab_size=128, positions=64)
TWO = trajectory(12, ("plan", PLAN, 2, 5), ("action", ACTION, 8, 11))


def test_a_result_line_is_a_sequence(tmp_path: Path) -> None:
    (read,), skipped = read_scored_sequences([write(tmp_path / "r.jsonl", line(TWO))], ACCEPTED)
    assert read.sequence.turns == (Turn("plan", 2, 5), Turn("action", 8, 11))
    assert read.sequence.token_ids == tuple(range(11))  # nothing behind the last turn
    tokens = sum(turn.end - turn.start for turn in read.sequence.turns)
    assert (read.scored, read.gold, tokens) == ((True, True), False, 6)
    assert read.logprobs == (-2, -3, -4, -8, -9, -10)
    assert skipped.sentences() == ()


def test_what_says_nothing_of_the_adapters_is_read_and_counted(tmp_path: Path) -> None:
    failed = line(TWO, error={"type": "ValueError", "message": ""})
    cut = trajectory(12, ("plan", PLAN, 2, 5), ("action", ACTION, 8, 11), finish=("truncated", "stop"))
    other = trajectory(12, ("plan", "x" * 64, 2, 5), ("action", ACTION, 6, 8), ("plan", "x" * 64, 9, 12))
    fork = trajectory(14, ("plan", PLAN, 2, 5), ("action", ACTION, 12, 14))
    only_cut = trajectory(12, ("plan", PLAN, 2, 5), finish=("truncated",))
    path = write(tmp_path / "r.jsonl", failed, line(cut), line(other), line(TWO, fork), line(only_cut))
    read, skipped = read_scored_sequences([path], ACCEPTED)
    assert [one.scored for one in read] == [(False, True), (False, True), (True, True), (False, True)]
    assert read[1].sequence.turns[0] == Turn("plan", 2, 5)  # it stays the writer of its tokens
    assert skipped.sentences() == (
        "skipped lines whose task ended in an error: 1",
        "skipped turns whose end was removed later: 2",
        "skipped turns of other adapters than those given: 2 of plan",
        "skipped turns of forks that are their parents' too: 1",
        "skipped trajectories without a turn that counts: 1",
    )


def test_gold_has_tokens_and_spans_only(tmp_path: Path) -> None:
    gold = {"token_ids": [5, 6, 7, 8], "generated": [["plan", None, 1, 3]]}
    (read,), _ = read_scored_sequences([write(tmp_path / "gold.jsonl", gold)], ACCEPTED)
    assert read.gold and read.scored == (True,) and read.logprobs == ()
    (example,) = examples_of([read], TuneOptions(), "base_lr_shared")
    assert (example.kl, example.cross_entropy) == (0, 1)
    (example,) = examples_of([read], TuneOptions(kl=0.5), "base_lr_shared")
    assert (example.kl, example.cross_entropy) == (0.5, 1)


def test_the_reward_or_a_field_weighs_the_cross_entropy(tmp_path: Path) -> None:
    lines = (line(TWO, reward=0.5), line(TWO), line(TWO, reward=0.0))
    read, _ = read_scored_sequences([write(tmp_path / "r.jsonl", *lines)], ACCEPTED)
    assert [e.cross_entropy for e in examples_of(read, TuneOptions(cross_entropy=2), "base_lr_shared")] == [1, 2, 0]
    assert [e.cross_entropy for e in examples_of(read, TuneOptions(cross_entropy=2, kl=0), "base_lr_shared")] == [1, 2]
    field = TuneOptions(cross_entropy=1, weight_field="result.score")
    with pytest.raises(TaskFileError, match=r"line 1: result\.score is None, not a number"):
        examples_of(read, field, "base_lr_shared")
    scored, _ = read_scored_sequences([write(tmp_path / "s.jsonl", line(TWO, result={"score": True}))], ACCEPTED)
    assert examples_of(scored, field, "base_lr_shared")[0].cross_entropy == 1
    negative, _ = read_scored_sequences([write(tmp_path / "n.jsonl", line(TWO, reward=-1))], ACCEPTED)
    with pytest.raises(TaskFileError, match="reward is -1"):
        examples_of(negative, TuneOptions(cross_entropy=1), "base_lr_shared")
    # The default loss takes no reward.
    assert examples_of(negative, TuneOptions(), "base_lr_shared")[0].cross_entropy == 0


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (trajectory(12, ("critic", PLAN, 2, 5)), "unknown agent, 'critic'"),
        ({**TWO, "token_ids": [*range(11), 128]}, "token id 128 is outside the model's vocabulary of 128 tokens"),
        (trajectory(66, ("plan", PLAN, 2, 66)), "its agents read 65 tokens, the model has 64 positions"),
        (trajectory(12, ("plan", PLAN, 0, 5)), "does not fit"),
        (trajectory(12, ("plan", PLAN, 2, 5), ("action", ACTION, 4, 6)), "does not fit"),
        (trajectory(12, ("plan", PLAN, 2, 13)), "does not fit"),
        ({**TWO, "token_ids": None}, "token_ids"),
        ({**TWO, "generated": [["plan", 2, 5], 3]}, "is not \\[agent, digest, start, end\\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_line(tmp_path: Path, entry: dict[str, object], says: str) -> None:
    with pytest.raises(TaskFileError, match=rf"r\.jsonl line 2: .*{says}"):
        read_scored_sequences([write(tmp_path / "r.jsonl", line(TWO), line(entry))], ACCEPTED)


def test_a_file_without_a_turn_that_counts_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", line(trajectory(12, ("plan", "x" * 64, 2, 5))))
    with pytest.raises(TaskFileError, match="adapter plan has digest pppppppppppp, the file has xxxxxxxxxxxx"):
        read_scored_sequences([path], ACCEPTED)
    path.write_text("")
    with pytest.raises(TaskFileError, match="there is no trajectory"):
        read_scored_sequences([path], ACCEPTED)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", line(TWO))
    path.write_text(path.read_text() + json.dumps(line(TWO))[:40])
    assert len(read_scored_sequences([path], ACCEPTED)[0]) == 1
