import math

import pytest
import torch

from lragent.runtime.sampling.sample import GREEDY, SamplingRow, log_probabilities, log_totals, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def row(temperature: float = 1.0, position: int = 0, **changes: object) -> SamplingRow:
    fields: dict[str, object] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | changes
    return SamplingRow(temperature, position=position, **fields)  # type: ignore[arg-type]


def frequencies(draws: int = 20000, **changes: object) -> torch.Tensor:
    rows = [row(position=position, **changes) for position in range(draws)]
    tokens = sample(LOGITS.repeat(draws, 1), rows).tokens_R
    return torch.bincount(tokens, minlength=len(LOGITS)) / draws


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 0.015
    assert bool((found[expected == 0] == 0).all())


def renormalised(kept: int) -> torch.Tensor:
    probs = LOGITS.softmax(0)
    probs[kept:] = 0
    return probs / probs.sum()


def test_uniform_is_uniform_and_differs_by_seed_and_position() -> None:
    values = torch.tensor([uniform(3, position) for position in range(5000)])
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert bool(((values >= 0) & (values < 1)).all())
    assert len({uniform(seed, position) for seed in range(5) for position in range(5)}) == 25


def test_greedy_takes_the_most_likely() -> None:
    assert sample(LOGITS[None], [row(temperature=0.0)]).tokens_R.tolist() == [0]


def test_distribution_at_temperature() -> None:
    assert_near(frequencies(), LOGITS.softmax(0))
    assert_near(frequencies(temperature=0.5), (LOGITS / 0.5).softmax(0))


def test_top_k() -> None:
    assert_near(frequencies(top_k=2), renormalised(2))
    assert_near(frequencies(top_k=100), LOGITS.softmax(0))


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probs = LOGITS.softmax(0)
    assert_near(frequencies(top_p=float(probs[0]) - 0.01), renormalised(1))
    assert_near(frequencies(top_p=float(probs[0]) + 0.01), renormalised(2))


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert_near(frequencies(min_p=0.2), renormalised(3))
    assert_near(frequencies(min_p=1.0), renormalised(1))


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 500, generator=generator)
    rows = [
        row(temperature=[0.0, 1.0, 2.0][i % 3], position=i, top_k=[0, 20][i % 2], top_p=[1.0, 0.9][i // 32], seed=i)
        for i in range(64)
    ]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], rows[i : i + 1]) for i in range(64)]
    assert together.tokens_R.tolist() == [int(one.tokens_R) for one in alone]
    assert together.logprobs == pytest.approx([one.logprobs[0] for one in alone], abs=1e-12)
    assert together.kept_mass == pytest.approx([one.kept_mass[0] for one in alone], abs=1e-12)


def test_forced_tokens_and_log_probabilities() -> None:
    logits = LOGITS.repeat(2, 1)
    samples = sample(logits, [row(forced=4), row(temperature=0.0)])
    assert samples.tokens_R.tolist() == [4, 0]
    assert samples.logprobs == [None, 0.0] and samples.kept_mass == [None, 1.0]
    expected = LOGITS.log_softmax(0)
    found = log_probabilities(logits, samples.tokens_R, log_totals(logits))
    torch.testing.assert_close(torch.tensor(found), expected[[4, 0]])


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"min_p": 0.2}, 2),
        ({"top_p": 0.6}, 1),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.2}, 2),
    ],
    ids=["none", "top_k", "min_p", "top_p", "all"],
)
def test_a_draw_tells_its_own_distribution(changes: dict[str, object], kept: int) -> None:
    """The filters are written out for these five logits at temperature 0.8."""
    rows = [row(temperature=0.8, position=position, **changes) for position in range(200)]
    samples = sample(LOGITS.repeat(200, 1), rows)
    probs = (LOGITS.double() / 0.8).softmax(0)
    mass = float(probs[:kept].sum())
    for token, logprob, found in zip(samples.tokens_R.tolist(), samples.logprobs, samples.kept_mass, strict=True):
        assert token < kept
        assert logprob == pytest.approx(math.log(float(probs[token]) / mass), abs=1e-9)
        assert found == pytest.approx(mass, abs=1e-9) and found <= 1


def test_excluded_tokens_are_legal() -> None:
    logits = LOGITS.clone()
    logits[[0, 3]] = -math.inf
    assert log_totals(logits[None]).isfinite().all()
    drawn = sample(logits.repeat(500, 1), [row(position=position, top_p=0.99) for position in range(500)])
    assert set(drawn.tokens_R.tolist()) == {1, 2, 4}
    assert all(value is not None and math.isfinite(value) for value in drawn.logprobs)
    assert sample(logits[None], [row(temperature=0.0)]).tokens_R.tolist() == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unusable_rows_are_known_by_their_total(value: float) -> None:
    bad = LOGITS.clone()
    bad[2] = value
    rows = torch.stack([LOGITS, bad, torch.full((5,), -math.inf), torch.full((5,), -3e38), torch.full((5,), 3e38)])
    assert log_totals(rows).isfinite().tolist() == [True, False, False, True, True]


def test_a_temperature_that_no_float_can_divide_by_is_greedy() -> None:
    logits = torch.tensor([[3e38, 3e38, -3e38, 0.0]])
    for temperature in (5e-324, 1e-300, GREEDY):
        samples = sample(logits, [row(temperature=temperature)])
        assert (samples.tokens_R.tolist(), samples.logprobs, samples.kept_mass) == ([0], [0.0], [1.0])
    for temperature in (2 * GREEDY, 1e-45, 1e308):
        samples = sample(logits, [row(temperature=temperature, min_p=0.5)])
        assert samples.tokens_R.tolist() in ([0], [1], [2], [3])
        assert samples.logprobs[0] is not None and samples.logprobs[0] <= 0
