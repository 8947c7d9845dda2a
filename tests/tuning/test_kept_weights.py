"""The rule by which an evaluation on held-out examples keeps weights."""

from __future__ import annotations

import random

import pytest

from lragent.tuning.train import is_worse


def test_noise_of_one_example_makes_nothing_worse() -> None:
    best = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert not is_worse([0.1, 0.2, 0.3, 0.4, 0.9], best)
    assert not is_worse([0.09, 0.19, 0.29, 0.39, 0.7], best)


def test_what_all_examples_show_is_worse() -> None:
    best = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert is_worse([part + 0.01 for part in best], best)
    assert not is_worse([part - 0.01 for part in best], best)
    assert not is_worse(best, best)


@pytest.mark.parametrize(("part", "expected"), [(0.2, True), (0.1, False), (0.05, False)])
def test_a_single_example_decides_alone(part: float, expected: bool) -> None:
    assert is_worse([part], [0.1]) is expected


def test_equal_weights_on_noisy_examples_are_seldom_found_worse() -> None:
    """A two-sided interval of two standard errors leaves some 2 to 5% on one side."""
    rng = random.Random(0)
    pairs = [([rng.gauss(1, 0.5) for _ in range(9)], [rng.gauss(1, 0.5) for _ in range(9)]) for _ in range(2000)]
    assert 0.01 < sum(is_worse(*pair) for pair in pairs) / len(pairs) < 0.06
