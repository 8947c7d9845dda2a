"""`neutral_shared`: what an agent computes depends on the tokens alone, and an adapter-free page serves everybody."""

import asyncio
from itertools import chain, permutations

import pytest

from lragent.runtime import Engine, Turn
from tests.runtime.random_operations import MODEL, TOLERANCE, assert_same, toy_engine
from tests.runtime.toy_oracle import NAMES, OracleTrajectory

PROMPT = [1, 2, 3, 4, 5, 6, 7]
PARTS = ([11, 12, 13], [14, 15, 16, 17], [18, 19])
AGENTS = ("plan", "act", "reflect")


def scores(engine: Engine, writers: tuple[str, ...]) -> dict[str, list[float]]:
    """Each agent's log-probabilities of the same tokens, after turns of `writers` that made the same text."""
    with engine.trajectory(PROMPT) as t:
        for name, part in zip(writers, PARTS, strict=True):
            t.generate(name, forced=part)
        return {name: t.score(name, [21, 22, 23, 24, 25]) for name in NAMES}


def test_a_result_does_not_depend_on_who_wrote_the_text() -> None:
    """Under every other shared scheme it does."""
    found = [scores(toy_engine("neutral_shared"), writers) for writers in permutations(AGENTS)]
    for other in (*found[1:], scores(toy_engine("neutral_shared"), ("base",) * 3)):
        for name in NAMES:
            assert other[name] == pytest.approx(found[0][name], abs=TOLERANCE)
    left, right = (scores(toy_engine("base_lr_shared"), writers)["act"] for writers in (AGENTS, AGENTS[::-1]))
    assert left != pytest.approx(right, abs=1e-3)


@pytest.mark.parametrize("budget", [3, 7, 512])
def test_a_result_does_not_depend_on_batch_and_chunks(budget: int) -> None:
    engine = toy_engine("neutral_shared", max_batch_tokens=budget)
    group = [engine.trajectory(PROMPT) for _ in range(8)]

    async def all_turns() -> list[Turn]:
        return await asyncio.gather(*(t.agenerate(NAMES[i % 4], max_new_tokens=6) for i, t in enumerate(group)))

    for i, turn in enumerate(asyncio.run(all_turns())):
        alone = OracleTrajectory(MODEL, "neutral_shared", PROMPT).turn(NAMES[i % 4], 6)
        assert_same((turn.token_ids, turn.logprobs), alone)


def test_base_is_the_model_without_adapters() -> None:
    """Alone, `base` under non_shared is that model."""
    with toy_engine("non_shared").trajectory([*PROMPT, *chain(*PARTS)]) as t:
        assert scores(toy_engine("neutral_shared"), AGENTS)["base"] == pytest.approx(
            t.score("base", [21, 22, 23, 24, 25]), abs=TOLERANCE
        )


def test_pages_are_found_whoever_wrote_them() -> None:
    engine = toy_engine("neutral_shared")  # pages of four tokens
    scores(engine, AGENTS)
    written = engine.stats().tokens.prefill + engine.stats().tokens.decode
    with engine.trajectory([*PROMPT, *chain(*PARTS)]) as t:
        turn = t.generate("reflect", max_new_tokens=1)
        assert (turn.usage.reused, turn.usage.prefill, turn.usage.acting) == (16, 0, 1)
    stats = engine.stats().tokens
    assert stats.prefill + stats.decode == written


def test_rows_are_counted_by_kind() -> None:
    engine = toy_engine("neutral_shared")
    with engine.trajectory(PROMPT) as t:
        usage = t.generate("plan", max_new_tokens=5).usage
        assert (usage.prefill, usage.decode, usage.acting, usage.computed) == (7, 4, 5, 16)
        usage = t.generate("base", max_new_tokens=3).usage
        assert (usage.prefill, usage.decode, usage.acting, usage.computed) == (1, 2, 0, 3)
        steps = engine.stats().steps
        t.score("act", [1, 2, 3, 4])  # the four tokens before them: one is pending
        assert engine.stats().steps == steps + 1
        tokens = engine.stats().tokens
        assert (tokens.prefill, tokens.acting) == (7 + 1 + 4, 5 + 4)


def test_a_decode_step_has_both_rows() -> None:
    engine = toy_engine("neutral_shared")
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=5)
    assert engine.stats().steps == 5


def test_a_step_of_one_token_takes_the_rows_in_turn() -> None:
    engine = toy_engine("neutral_shared", max_batch_tokens=1)
    oracle = OracleTrajectory(MODEL, "neutral_shared", PROMPT)
    with engine.trajectory(PROMPT) as t:
        turn = t.generate("plan", max_new_tokens=5)
        assert_same((turn.token_ids, turn.logprobs), oracle.turn("plan", 5))
    assert engine.stats().steps == 7 + 1 + 2 * 4
