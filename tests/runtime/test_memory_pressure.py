"""Losing pages changes what is computed, never what comes out; what can't fit fails alone."""

import asyncio

import pytest

from lragent.errors import CacheMemoryError, RequestError
from lragent.runtime import Engine, EngineConfig, Trajectory, Turn
from lragent.runtime.schemes import SCHEMES as BY_NAME
from tests.runtime.random_operations import MODEL, SCHEMES, assert_same, toy_engine
from tests.runtime.toy_oracle import OracleTrajectory
from tests.runtime.toy_program import POSITIONS, schema, toy_program

PROMPTS = [[start, 30, 31, 32, 33, 34, 35] for start in range(6)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_preempted_after_two_agents_wrote_with_fork_and_chunks_inside_a_page(scheme: str) -> None:
    engine = toy_engine(scheme, pages=16, page_size=4, max_batch_tokens=6)
    pairs = [(engine.trajectory(prompt), OracleTrajectory(MODEL, scheme, prompt)) for prompt in PROMPTS[:3]]
    for name in ("plan", "act"):
        for trajectory, oracle in pairs:
            turn = trajectory.generate(name, max_new_tokens=3)
            assert_same((turn.token_ids, turn.logprobs), oracle.turn(name, 3))
    pairs += [(trajectory.fork(), oracle.fork()) for trajectory, oracle in pairs]

    async def all_turns(name: str) -> list[Turn]:
        return await asyncio.gather(*(t.agenerate(name, max_new_tokens=14) for t, _ in pairs))

    for name in ("reflect", "plan"):
        for turn, (_, oracle) in zip(asyncio.run(all_turns(name)), pairs, strict=True):
            assert_same((turn.token_ids, turn.logprobs), oracle.turn(name, 14))
    assert engine.stats().preemptions > 0
    assert engine.stats().tokens.replay > 0
    for trajectory, _ in pairs:
        trajectory.close()
    assert engine.stats().pages_held == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mixed_batch_equals_one_at_a_time(scheme: str) -> None:
    agents = ("base", "plan", "act", "reflect", "plan", "base")

    async def run(engine: Engine, group: list[Trajectory]) -> list[Turn]:
        turns = (
            t.agenerate(name, max_new_tokens=5, temperature=temperature, seed=9)
            for t, name, temperature in zip(group, agents, (0.0, 1.0, 0.7, 0.0, 2.0, 1.0), strict=True)
        )
        return await asyncio.gather(*turns) if engine.stats().turns == 0 else [await turn for turn in turns]

    results = []
    for one_at_a_time in (False, True):
        engine = toy_engine(scheme, max_batch_tokens=10)
        if one_at_a_time:
            engine.trajectory([1]).generate("base", max_new_tokens=1)
        turns = asyncio.run(run(engine, [engine.trajectory(prompt) for prompt in PROMPTS]))
        results.append([turn.token_ids for turn in turns])
        if not one_at_a_time:
            assert engine.stats().steps < 20
    assert results[0] == results[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_idle_trajectories_lose_their_pages_first_and_least_recently_used_first(scheme: str) -> None:
    engine = toy_engine(scheme, pages=6)
    first, second = engine.trajectory(PROMPTS[0]), engine.trajectory(PROMPTS[1])
    first.generate("plan", max_new_tokens=2)
    second.generate("plan", max_new_tokens=2)
    third = engine.trajectory([40 - 1 - i for i in range(14)])
    third.generate("plan", max_new_tokens=1)
    stats = engine.stats()
    assert (stats.dropped_tables, stats.preemptions) == (1, 0)
    assert second.generate("plan", max_new_tokens=1).usage.replay == 0
    for trajectory in (first, second, third):
        trajectory.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_can_never_fit_fails_alone(scheme: str) -> None:
    engine = toy_engine(scheme, pages=5)
    too_long, fits = engine.trajectory(list(range(21))), engine.trajectory(PROMPTS[0])
    grows = engine.trajectory(PROMPTS[1])

    async def run() -> list[Turn | BaseException]:
        return await asyncio.gather(
            too_long.agenerate("plan", max_new_tokens=2),
            grows.agenerate("plan", max_new_tokens=30),
            fits.agenerate("act", max_new_tokens=8),
            return_exceptions=True,
        )

    long, grown, turn = asyncio.run(run())
    assert isinstance(long, CacheMemoryError)
    assert "21 tokens" in str(long) and "5 pages" in str(long)
    assert isinstance(grown, CacheMemoryError)
    assert isinstance(turn, Turn)
    assert grows.token_ids == PROMPTS[1]
    assert len(grows.generate("plan", max_new_tokens=3).token_ids) == 3
    for trajectory in (too_long, fits, grows):
        trajectory.close()
    assert engine.stats().pages_held == 0


def test_longer_than_the_models_positions() -> None:
    engine = toy_engine("base_lr_shared")
    with engine.trajectory([1] * (POSITIONS + 1)) as t, pytest.raises(RequestError, match="256 positions"):
        t.generate("plan")
    with engine.trajectory([1] * (POSITIONS - 3)) as t:
        turn = t.generate("plan", max_new_tokens=50)
        assert (len(turn.token_ids), turn.finish_reason) == (3, "length")


def test_no_page_fits() -> None:
    with pytest.raises(CacheMemoryError, match="at least 2"):
        Engine(toy_program("split"), EngineConfig("base_lr_shared", kv_memory=100))
    with pytest.raises(RequestError, match="kv_memory"):
        Engine(toy_program("split"), EngineConfig("base_lr_shared", kv_memory="lots"))


def test_more_than_the_system_gives() -> None:
    with pytest.raises(CacheMemoryError, match="can't be allocated"):
        Engine(toy_program("split"), EngineConfig("base_lr_shared", kv_memory=1 << 60))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_peak_held_bytes_equal_the_formulas(scheme: str) -> None:
    """Numbers a token: DESIGN.md section 2; pages of four float64 tokens; three agents of ranks 2, 2, 3 and 2, 3, 0."""
    engine = toy_engine(scheme)
    with engine.trajectory(PROMPTS[0]) as t:
        for name in ("plan", "act", "reflect"):
            t.generate(name, max_new_tokens=5)
        # The last sampled token is not processed; agents see 11, 16 and 21 tokens.
        pages = [-(-tokens // 4) for tokens in (11, 16, 21)]
    base = 2 * 2 * (2 * 4)  # layers, K and V, heads x head dim
    ranks = [2 * 4, 2 * 5, 2 * 3]  # both layers
    distinct = 2 * (5 + 5)
    numbers = {
        "non_shared": sum(pages) * base,
        "full_shared": pages[-1] * base,
        "base_lr_shared": pages[-1] * (base + distinct),
        "base_shared": pages[-1] * base + sum(count * rank for count, rank in zip(pages, ranks, strict=True)),
        "rebase_shared": pages[-1] * (base + sum(ranks)),
        "neutral_shared": pages[-1] * (base + distinct),
    }
    assert engine.stats().peak_held_bytes == numbers[scheme] * 4 * 8
    layout = BY_NAME[scheme].layout
    assert schema(layout).base_numbers_per_token() == base
