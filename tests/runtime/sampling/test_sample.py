import torch

from lragent.runtime.sampling.sample import SamplingRow, log_probabilities, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def row(temperature: float = 1.0, position: int = 0, **changes: object) -> SamplingRow:
    fields: dict[str, object] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | changes
    return SamplingRow(temperature, position=position, **fields)  # type: ignore[arg-type]


def frequencies(draws: int = 20000, **changes: object) -> torch.Tensor:
    rows = [row(position=position, **changes) for position in range(draws)]
    tokens = sample(LOGITS.repeat(draws, 1), rows)
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
    assert sample(LOGITS[None], [row(temperature=0.0)]).tolist() == [0]


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
    alone = [int(sample(logits[i : i + 1], rows[i : i + 1])) for i in range(64)]
    assert together.tolist() == alone


def test_forced_tokens_and_log_probabilities() -> None:
    tokens = sample(LOGITS.repeat(2, 1), [row(forced=4), row(temperature=0.0)])
    assert tokens.tolist() == [4, 0]
    expected = LOGITS.log_softmax(0)
    found = log_probabilities(LOGITS.repeat(2, 1), tokens)
    torch.testing.assert_close(torch.tensor(found), expected[[4, 0]])
