"""What is in the cache already is not computed again, and never changes an output."""

import asyncio

import pytest

from lragent.runtime import Turn
from tests.runtime.random_operations import MODEL, SCHEMES, assert_same, toy_engine
from tests.runtime.toy_oracle import OracleTrajectory

PROMPT = list(range(1, 15))  # three pages of four tokens, and two more


def expected(scheme: str, turns: list[tuple[str, int]]) -> list[tuple[list[int], list[float]]]:
    oracle = OracleTrajectory(MODEL, scheme, PROMPT)
    return [oracle.turn(name, count) for name, count in turns]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_prompt_later_reuses_its_full_pages(scheme: str) -> None:
    engine = toy_engine(scheme)
    turns = [("plan", 6), ("act", 3), ("plan", 4)]
    for attempt in range(2):
        with engine.trajectory(PROMPT) as t:
            for number, (found, wanted) in enumerate(
                zip((t.generate(name, max_new_tokens=n) for name, n in turns), expected(scheme, turns), strict=True)
            ):
                assert_same((found.token_ids, found.logprobs), wanted)
                if attempt == 1 and number == 0:
                    assert found.usage.reused == 12
                    assert found.usage.prefill == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_writer_reuses_nothing_that_depends_on_the_writer(scheme: str) -> None:
    engine = toy_engine(scheme)
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=2)
    with engine.trajectory(PROMPT) as t:
        turn = t.generate("act", max_new_tokens=3)
        assert turn.usage.reused == (12 if scheme == "neutral_shared" else 0)
        assert_same((turn.token_ids, turn.logprobs), expected(scheme, [("act", 3)])[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_prompt_of_whole_pages_runs_its_last_token_again(scheme: str) -> None:
    engine = toy_engine(scheme)
    first: Turn | None = None
    for _ in range(2):
        with engine.trajectory(PROMPT[:12]) as t:
            turn = t.generate("plan", max_new_tokens=4)
            first = first or turn
    assert turn.token_ids == first.token_ids
    usage = turn.usage
    if scheme == "neutral_shared":
        assert (usage.prefill, usage.acting, usage.rerun, usage.reused) == (0, 4, 0, 12)
    else:
        assert (usage.prefill, usage.acting, usage.rerun, usage.reused) == (0, 0, 1, 11)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("forked", [False, True])
def test_many_at_once_compute_a_shared_prompt_once(scheme: str, forked: bool) -> None:
    engine = toy_engine(scheme, max_batch_tokens=8)
    if forked:
        root = engine.trajectory(PROMPT)
        group = [root, *(root.fork() for _ in range(15))]
    else:
        group = [engine.trajectory(PROMPT) for _ in range(16)]

    async def all_turns() -> list[Turn]:
        return await asyncio.gather(*(t.agenerate("plan", max_new_tokens=3) for t in group))

    turns = asyncio.run(all_turns())
    wanted = expected(scheme, [("plan", 3)])[0]
    for turn in turns:
        assert_same((turn.token_ids, turn.logprobs), wanted)
    assert engine.stats().tokens.prefill == 12 + 16 * 2
    assert engine.stats().tokens.reused == 15 * 12


def test_forks_catch_up_once() -> None:
    engine = toy_engine("base_shared")
    with engine.trajectory(PROMPT) as root:
        root.generate("plan", max_new_tokens=3)
        forks = [root.fork() for _ in range(6)]

        async def all_turns() -> list[Turn]:
            return await asyncio.gather(*(t.agenerate("act", max_new_tokens=2) for t in forks))

        turns = asyncio.run(all_turns())
        wanted = expected("base_shared", [("plan", 3), ("act", 2)])[1]
        for turn in turns:
            assert_same((turn.token_ids, turn.logprobs), wanted)
        # Four full pages; nothing is left over that each fork would have to do for itself.
        assert engine.stats().tokens.catch_up == 16


def test_a_waiter_goes_on_when_the_one_it_waits_for_goes_away() -> None:
    engine = toy_engine("base_lr_shared", max_batch_tokens=4)
    first, second = engine.trajectory(PROMPT), engine.trajectory(PROMPT)

    async def run() -> Turn:
        leader = asyncio.ensure_future(first.agenerate("plan", max_new_tokens=3))
        waiter = asyncio.ensure_future(second.agenerate("plan", max_new_tokens=3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leader.cancel()
        return await waiter

    turn = asyncio.run(run())
    assert_same((turn.token_ids, turn.logprobs), expected("base_lr_shared", [("plan", 3)])[0])
    assert len(first) == len(PROMPT)
    first.close()
    second.close()
    assert engine.stats().pages_held == 0


def test_rebase_reuses_the_adapter_free_pass_of_others_too() -> None:
    engine = toy_engine("rebase_shared")
    turns = [("plan", 1), ("act", 2)]
    for wanted in (14, 2):
        with engine.trajectory(PROMPT) as t:
            t.generate("plan", max_new_tokens=1)
            turn = t.generate("act", max_new_tokens=2)
            assert turn.usage.adapter_free == wanted
            assert_same((turn.token_ids, turn.logprobs), expected("rebase_shared", turns)[1])
