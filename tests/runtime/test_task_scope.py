"""Trajectories that a workflow opens belong to its task: closed with it, recorded with it, with seeds of its own."""

import asyncio
import hashlib
from typing import Any

import pytest

from lragent.errors import RequestError
from lragent.runtime import Trajectory
from lragent.runtime.seeds import SeedPath
from tests.runtime.random_operations import SCHEMES, toy_engine

Task = dict[str, Any]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_workflow_leaves_open_is_closed_and_recorded(scheme: str) -> None:
    engine = toy_engine(scheme, pages=80)

    async def workflow(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, 3, 4, 5, task["id"]])
        await t.agenerate("plan", max_new_tokens=2)
        branches = [t.fork() for _ in range(3)]
        extra = engine.trajectory([9, 8, 7])
        await asyncio.gather(*(one.agenerate("act", max_new_tokens=4) for one in (*branches, extra)))
        branches[1].close()
        if task["id"] == 2:
            raise KeyError("late")
        return {"ids": [one.token_ids for one in (t, branches[0], branches[2], extra)]}

    results = list(engine.run(workflow, [{"id": i} for i in range(5)], concurrency=2))
    assert engine.stats().pages_held == 0
    engine.check_integrity()
    for result in results:
        assert len(result.trajectories) == 4
        if result.result is not None:
            assert [record.token_ids for record in result.trajectories] == result.result["ids"]
        decoded = sum(span.end - span.start for record in result.trajectories for span in record.generated)
        assert decoded == 2 + 2 * (2 + 4) + 4
        assert result.usage.decode == (2 - 1) + 4 * (4 - 1)
    assert {result.index for result in results if result.error} == {2}


def test_a_closed_trajectory_is_recorded_with_its_writers() -> None:
    engine = toy_engine("base_lr_shared")

    async def workflow(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, 3])
        await t.agenerate("plan", max_new_tokens=3)
        t.close()
        return {}

    (result,) = engine.run(workflow, [{"id": 0}])
    (record,) = result.trajectories
    assert [span[:1] + span[2:] for span in record.written] == [("plan", 0, 5)]


def test_turns_that_outlive_their_task_end_and_nothing_can_be_opened() -> None:
    engine = toy_engine("base_lr_shared")
    strays: list[asyncio.Task[Any]] = []

    async def later(t: Trajectory) -> None:
        await asyncio.sleep(0.01)
        engine.trajectory([1])

    async def workflow(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, task["id"]])
        if task["id"] == 0:
            branch = t.fork()
            strays.append(asyncio.create_task(branch.agenerate("plan", max_new_tokens=40)))
            strays.append(asyncio.create_task(later(t)))
            await asyncio.sleep(0)
            return {}
        await t.agenerate("plan", max_new_tokens=30)
        await asyncio.sleep(0.03)
        return {}

    results = list(engine.run(workflow, [{"id": i} for i in range(3)]))
    assert [result.error for result in results] == [None] * 3
    assert [str(task.exception()).split("\n")[0] for task in strays] == [
        "the trajectory was closed during a turn",
        "task 0 has ended, no trajectory can be opened in it",
    ]
    assert engine.stats().pages_held == 0


def test_a_fork_of_a_trajectory_from_outside_belongs_to_the_task() -> None:
    engine = toy_engine("base_lr_shared")
    with engine.trajectory([1, 2, 3, 4, 5]) as shared:
        shared.generate("plan", max_new_tokens=2)

        async def workflow(task: Task, t: Trajectory) -> Task:
            branch = shared.fork()
            await branch.agenerate("act", max_new_tokens=5, temperature=2.0)
            return {}

        def drawn(concurrency: int) -> dict[int, list[int]]:
            results = engine.run(workflow, [{"id": i} for i in range(4)], concurrency)
            return {result.index: result.trajectories[1].seeds[1:] for result in results}

        assert drawn(1) == drawn(4)
        assert len(shared.token_ids) == 7
        engine.check_integrity()
    assert engine.stats().pages_held == 0


async def sampled(task: Task, t: Trajectory) -> Task:
    t.append([1, 2, 3])
    branch = t.fork()
    for one in (t, branch, branch.fork(), t.fork()):
        await one.agenerate("plan", max_new_tokens=3, temperature=1.5)
        await one.agenerate("act", max_new_tokens=3, temperature=1.5)
    return {}


def seeds_of(tasks: list[Task], **options: Any) -> list[list[int]]:
    results = sorted(toy_engine("base_lr_shared").run(sampled, tasks, **options), key=lambda result: result.index)
    return [[seed for record in result.trajectories for seed in record.seeds] for result in results]


def test_every_turn_of_every_sample_has_a_seed_of_its_own_and_the_same_one_again() -> None:
    tasks = [{"id": name} for name in ("a", "b", "a", "a")]  # three samples of one task
    found = seeds_of(tasks)
    assert [len(seeds) for seeds in found] == [8] * 4
    assert len({seed for seeds in found for seed in seeds}) == 4 * 8
    assert seeds_of(tasks, concurrency=1) == found
    assert not set(seeds_of(tasks, seed=1)[0]) & set(found[0])
    assert seeds_of(list(reversed(tasks)))[2] == found[1]
    assert found[0][0] == SeedPath(0, "a", 0, (0,)).seed(0)
    assert found[1][2] == SeedPath(0, "b", 0, (0, 0)).seed(0)
    assert found[2][1] == SeedPath(0, "a", 1, (0,)).seed(1)
    assert all(0 <= seed < 2**53 for seeds in found for seed in seeds)


def test_seeds_stay_as_they_are() -> None:
    """Results can be repeated with later versions."""
    for text, path, turn in (
        (b'[0, "task", 0, [0], 0]', SeedPath(0, "task", 0, (0,)), 0),
        (b"[7, 3, 1, [0, 2], 4]", SeedPath(7, 3, 1, (0,)).child(2), 4),
    ):
        assert path.seed(turn) == int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 11


def test_trajectories_outside_a_run_draw_differently_and_repeatably() -> None:
    def draw() -> list[list[int]]:
        engine = toy_engine("base_lr_shared")
        found = []
        for _ in range(3):
            with engine.trajectory([1, 2, 3]) as t:
                turn = t.generate("plan", max_new_tokens=12, temperature=1.5)
                t.truncate(3)
                again = t.generate("plan", max_new_tokens=12, temperature=1.5)
                found += [turn.token_ids, again.token_ids]
        return found

    first = draw()
    assert first == draw() and len({tuple(ids) for ids in first}) == 6


def test_a_turn_that_failed_draws_the_same_when_it_is_done_again() -> None:
    engine = toy_engine("base_lr_shared")

    async def run() -> None:
        with engine.trajectory([1, 2, 3]) as t:
            first = asyncio.ensure_future(t.agenerate("plan", max_new_tokens=40, temperature=1.5))
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert (await t.agenerate("plan", max_new_tokens=2, temperature=1.5)).seed == SeedPath(
                0, None, 0, (0,)
            ).seed(0)

    asyncio.run(run())


def test_a_seed_that_is_given_is_used_as_it_is() -> None:
    with toy_engine("base_lr_shared").trajectory([1, 2, 3]) as t:
        assert [t.generate("plan", max_new_tokens=1, seed=seed).seed for seed in (5, -1, 2**70)] == [5, -1, 2**70]
        with pytest.raises(RequestError, match="seed is 'a'"):
            t.generate("plan", seed="a")  # type: ignore[arg-type]
