"""Turns, forks, truncation, scores and closing in random order under memory pressure equal the schemes' definitions.

The oracle has no cache at all, so equality also proves that prefix hits, chunking, batching, preemption and replay
never change what comes out.
"""

from itertools import combinations

import pytest

from tests.runtime.random_operations import MODEL, PROMPTS, SCHEMES, TOLERANCE, Session, toy_engine
from tests.runtime.toy_oracle import OracleTrajectory


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("pages", "page_size", "budget", "most"), [(12, 4, 5, 3), (17, 3, 16, 9), (500, 4, 100, 6), (60, 1, 16, 6)]
)
@pytest.mark.parametrize("seed", range(3))
def test_random_operations_equal_the_oracle(
    scheme: str, pages: int, page_size: int, budget: int, most: int, seed: int
) -> None:
    engine = toy_engine(scheme, pages=pages, page_size=page_size, max_batch_tokens=budget)
    Session(engine, seed=seed, most=most).run(operations=22)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_little_memory_really_costs_replays(scheme: str) -> None:
    """Guards the test above against testing nothing."""
    engine = toy_engine(scheme, pages=12, max_batch_tokens=16)
    Session(engine, seed=5, most=6).run(operations=40)
    stats = engine.stats()
    assert stats.tokens.replay > 0
    assert stats.dropped_tables > 0
    assert stats.evictions > 0


def test_the_schemes_differ_on_the_toy_model() -> None:
    """Weak adapters would make all schemes agree, and the tests above prove nothing."""
    scores = []
    for scheme in SCHEMES:
        oracle = OracleTrajectory(MODEL, scheme, PROMPTS[0])
        for name in ("plan", "act", "base", "reflect"):
            oracle.turn(name, 3, [1, 2, 3])
        scores.append(oracle.score("plan", [4, 5, 6]))
    for first, second in combinations(scores, 2):
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1000 * TOLERANCE
