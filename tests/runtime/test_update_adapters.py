"""Adapters that change in an engine: no page is stale, and open trajectories keep the adapters that they used."""

from __future__ import annotations

import asyncio
import random

import pytest

from lragent.errors import RequestError
from lragent.runtime import Engine, Trajectory
from lragent.runtime.update_adapters import VersionInUse
from tests.runtime.random_operations import MODEL, SCHEMES, assert_same, toy_engine
from tests.runtime.toy_oracle import OracleTrajectory
from tests.runtime.toy_program import ToyModel
from tests.runtime.toy_slots import OTHER, agent_of, updatable_engine, with_adapters

PROMPT = list(range(1, 15))  # three pages of four tokens, and two more
TURNS = (("plan", 5), ("reflect", 4), ("act", 3), ("plan", 3))
SLOT = {"plan": 1, "act": 2, "reflect": 3}


def run(engine: Engine, scheme: str, model: ToyModel) -> int:
    """A trajectory of turns of all agents, compared with their definition; returns the tokens that were reused."""
    oracle = OracleTrajectory(model, scheme, PROMPT)
    with engine.trajectory(PROMPT) as t:
        for name, count in TURNS:
            turn = t.generate(name, max_new_tokens=count)
            assert_same((turn.token_ids, turn.logprobs), oracle.turn(name, count))
        return t.usage.reused


@pytest.mark.parametrize("updated", [("reflect",), ("act", "plan"), ("plan", "act", "reflect")], ids="-".join)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_warm_cache_has_no_stale_pages(scheme: str, updated: tuple[str, ...]) -> None:
    """The page of a writer holds x A of all agents: it must not be found again once any of these A has changed."""
    engine = updatable_engine(scheme, MODEL)
    run(engine, scheme, MODEL)
    after = with_adapters(MODEL, OTHER, [SLOT[name] for name in updated])
    assert engine.update_adapters(dict.fromkeys(updated, after)) == {
        name: agent_of(after, SLOT[name]).digest for name in updated
    }
    run(engine, scheme, after)
    assert run(engine, scheme, after) >= 12  # the prompt's pages, at least
    engine.update_adapters(dict.fromkeys(updated, MODEL))
    run(engine, scheme, MODEL)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_an_update_of_b_leaves_in_the_cache(scheme: str) -> None:
    """Pages that the updated agent wrote are others'; `neutral_shared`, where `base` writes all, keeps everything."""
    engine = updatable_engine(scheme, MODEL)
    with engine.trajectory(PROMPT) as t:
        t.generate("act", max_new_tokens=1)
    reflect = with_adapters(MODEL, OTHER, [3], ("delta_q", "b_k", "b_v"))
    both = with_adapters(reflect, OTHER, [2], ("delta_q", "b_k", "b_v"))
    for model, names, kept in ((reflect, ["reflect"], 12), (both, ["act"], 12 if scheme == "neutral_shared" else 0)):
        engine.update_adapters(dict.fromkeys(names, model))
        oracle = OracleTrajectory(model, scheme, PROMPT)
        with engine.trajectory(PROMPT) as t:
            turn = t.generate("act", max_new_tokens=1)
            assert turn.usage.reused == kept
            assert_same((turn.token_ids, turn.logprobs), oracle.turn("act", 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_open_trajectory_uses_the_new_adapter_of_an_agent_that_it_has_not_used(scheme: str) -> None:
    """Its pages hold columns of the old A, partly; they are computed again when the agent first acts."""
    engine = updatable_engine(scheme, MODEL)
    after = with_adapters(MODEL, OTHER, [SLOT["reflect"]])
    # Until the update both models are the same for plan.
    oracle = OracleTrajectory(after, scheme, PROMPT)
    with engine.trajectory(PROMPT) as t, engine.trajectory(PROMPT) as second:
        for name, count in (("plan", 5), ("plan", 6), ("reflect", 4), ("plan", 9), ("reflect", 2)):
            turn = t.generate(name, max_new_tokens=count)
            assert_same((turn.token_ids, turn.logprobs), oracle.turn(name, count))
            if count == 5:
                second.generate("plan", max_new_tokens=11)
                engine.update_adapters({"reflect": after})
        assert [span.adapter for span in t.record().generated[2:3]] == [agent_of(after, 3).digest]
    engine.update_adapters({"reflect": MODEL})
    run(engine, scheme, MODEL)


def test_an_adapter_in_use_stays_and_nothing_changes() -> None:
    engine = updatable_engine("base_lr_shared", MODEL)
    after = with_adapters(MODEL, OTHER, [1, 2])
    t = engine.trajectory(PROMPT)
    t.generate("plan", max_new_tokens=2)
    before = engine.program.identity()
    with pytest.raises(VersionInUse, match="1 open trajectories use the present adapter of plan, and no slot is spare"):
        engine.update_adapters({"act": after, "plan": after})
    assert engine.program.identity() == before
    run(engine, "base_lr_shared", MODEL)
    with t.fork() as branch:
        t.close()
        with pytest.raises(VersionInUse):
            engine.update_adapters({"plan": after})
        assert branch.record().generated[0].adapter == agent_of(MODEL, 1).digest
    engine.update_adapters({"act": after, "plan": after})
    assert t.record().written[0].adapter == agent_of(MODEL, 1).digest  # also of a closed one, and after an update
    assert engine.program.identity() != before
    run(engine, "base_lr_shared", after)


def test_waiting_for_the_last_trajectory() -> None:
    engine = updatable_engine("base_lr_shared", MODEL)
    after = with_adapters(MODEL, OTHER, [3])
    done: list[str] = []

    async def act(length: int) -> None:
        with engine.trajectory(PROMPT) as t:
            await t.agenerate("reflect", max_new_tokens=length)
            done.append("trajectory")

    async def update() -> None:
        await asyncio.sleep(0)
        await engine.aupdate_adapters({"reflect": after})
        done.append("update")

    async def all_of_it() -> None:
        await asyncio.gather(act(3), act(9), update())

    asyncio.run(all_of_it())
    assert done == ["trajectory", "trajectory", "update"]
    run(engine, "base_lr_shared", after)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_updates_between_random_turns(scheme: str, seed: int) -> None:
    """Adapters go back and forth under open trajectories that haven't used them, some in the middle of a turn."""
    chance = random.Random(seed)
    engine = updatable_engine(scheme, MODEL)
    models = [MODEL]
    steady = engine.on_step

    def step() -> None:
        assert steady is not None
        steady()
        if chance.random() < 0.3:
            new = chance.choice([MODEL, OTHER])
            fields = chance.choice([("a_k", "b_k"), ("b_k",), ("delta_q",)])
            models.append(with_adapters(models[-1], new, [3], fields))
            engine.update_adapters({"reflect": models[-1]})

    async def turns(opened: list[Trajectory]) -> None:
        await asyncio.gather(*(t.agenerate(chance.choice(["plan", "act"]), max_new_tokens=6) for t in opened))

    for _ in range(4):
        opened = [engine.trajectory(PROMPT[: chance.randint(9, 14)]) for _ in range(3)]
        engine.on_step = step
        asyncio.run(turns(opened))
        engine.on_step = steady
        for t in opened:
            with t:
                found = t.generate("reflect", max_new_tokens=3)
                record = t.record()
                oracle = OracleTrajectory(models[-1], scheme, record.token_ids[: record.generated[0].start])
                first = record.generated[0]
                oracle.turn(first.agent, first.end - first.start, record.token_ids[first.start : first.end])
                assert_same((found.token_ids, found.logprobs), oracle.turn("reflect", 3))


def test_what_can_not_be_updated() -> None:
    engine = updatable_engine("non_shared", MODEL)
    with pytest.raises(RequestError, match="unknown agent 'nobody'"):
        engine.update_adapters({"nobody": MODEL})
    with pytest.raises(RequestError, match="the model without adapter"):
        engine.update_adapters({"base": MODEL})
    with pytest.raises(RequestError, match="can't be changed in memory"):
        toy_engine("non_shared").update_adapters({"plan": MODEL})
