"""Intervals, and the gold file that tuning reads."""

from __future__ import annotations

import math
import random

import pytest

from examples.fact_world import format
from examples.fact_world.accuracy_rows import BARS, ORDINARY, ROWS, SHIPPED, TUNINGS
from examples.fact_world.gold_file import gold_lines
from examples.fact_world.intervals import paired_difference, wilson
from examples.fact_world.padding import padded
from examples.fact_world.world import make_tasks
from lragent.tuning.options import TuneOptions


def test_wilson() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0


def test_equal_results_have_a_narrow_interval_around_zero() -> None:
    left = [True] * 30 + [False] * 10
    difference, low, high = paired_difference(left, left)
    assert difference == 0
    (share_low, share_high), share = wilson(30, 40), 0.75
    unrelated = math.hypot(share - share_low, share_high - share)
    assert -unrelated / 2 < low <= 0 <= high < unrelated / 2


def test_paired_difference_of_a_table_by_hand() -> None:
    """100 tasks: 50 right in both, 15 on the left alone, 5 on the right alone."""
    left = [True] * 65 + [False] * 35
    right = [True] * 50 + [False] * 15 + [True] * 5 + [False] * 30
    phi = 1375 / math.sqrt(65 * 35 * 55 * 45)
    (low_left, high_left), (low_right, high_right) = wilson(65, 100), wilson(55, 100)
    below = math.hypot(0.65 - low_left, high_right - 0.55) ** 2 - 2 * phi * (0.65 - low_left) * (high_right - 0.55)
    above = math.hypot(high_left - 0.65, 0.55 - low_right) ** 2 - 2 * phi * (high_left - 0.65) * (0.55 - low_right)
    expected = (0.1, 0.1 - math.sqrt(below), 0.1 + math.sqrt(above))
    assert paired_difference(left, right) == pytest.approx(expected)


def test_paired_difference_covers_the_truth() -> None:
    """Pairs with shares 0.8 and 0.7: about 95% of the intervals contain 0.1."""
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        pairs = [(value < 0.8, value < 0.65 or value > 0.95) for value in (rng.random() for _ in range(200))]
        _, low, high = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_results_of_other_tasks_are_not_paired() -> None:
    with pytest.raises(ValueError, match="can't be paired"):
        paired_difference([True], [True, False])


def test_gold_spans_are_the_texts_of_the_agents() -> None:
    tasks = make_tasks("train", 3)
    for line in gold_lines(tasks, lambda text: list(text.encode())):
        spoken = [(role, bytes(line["token_ids"][start:end]).decode()) for role, _, start, end in line["generated"]]
        assert [role for role, _ in spoken][-3:] == ["plan", "action", "reflect"]
        assert spoken[0][1].startswith("Steps: ") or "Steps: " in spoken[0][1]
        assert all(text.endswith("\n") for role, text in spoken if role != "reflect")
        assert all(digest is None for _, digest, _, _ in line["generated"])


def test_every_row_and_bar_can_be_made() -> None:
    sets = {SHIPPED, ORDINARY, *(tuning.name for tuning in TUNINGS)}
    assert {row.adapters for row in ROWS} <= sets
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(bar.left in ROWS and bar.right in ROWS for bar in BARS)
    for tuning in TUNINGS:
        TuneOptions(add_modules=tuning.add_modules)
        assert isinstance(tuning.add_modules, tuple) and tuning.parent in (SHIPPED, ORDINARY)


def test_padded_tasks_are_longer_by_entries_that_do_not_answer_them() -> None:
    def tokenize(text: str) -> list[int]:
        return list(range(len(text.split())))

    for task in make_tasks("test", 3):
        longer = padded(task, 1500, tokenize)
        assert 700 < len(tokenize(longer["notes"])) <= 950
        assert task["answer"] not in longer["notes"]
        assert longer == {**task, "notes": longer["notes"]}
        assert padded(task, 1500, tokenize) == longer
        opening = format.opening(longer["question"], longer["notes"]).text
        assert opening.index(longer["notes"]) < opening.index(task["question"])
        assert format.opening(task["question"]).text == opening.replace(f"Notes:\n{longer['notes']}\n", "")
