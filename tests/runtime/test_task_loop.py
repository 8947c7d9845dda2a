import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from lragent.errors import RequestError
from lragent.runtime import RolloutResult, Trajectory
from tests.runtime.random_operations import SCHEMES, toy_engine

Task = dict[str, Any]


async def workflow(task: Task, t: Trajectory) -> Task:
    t.append(task["prompt"])
    plan = await t.agenerate("plan", max_new_tokens=4)
    if task.get("fails"):
        raise ValueError(f"task {task['id']} is broken")
    t.append([7, 8, 9])
    act = await t.agenerate("act", max_new_tokens=3)
    scores = await t.ascore("reflect", [1, 2])
    return {"tokens": plan.token_ids + act.token_ids, "scores": len(scores)}


def tasks(count: int) -> list[Task]:
    return [{"id": f"t{i}", "prompt": [1, 2, 3, 4, 5, i % 7], "fails": i == 3} for i in range(count)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_do_not_depend_on_concurrency_and_errors_stay_in_their_task(scheme: str) -> None:
    found: list[dict[int, RolloutResult]] = []
    for concurrency in (1, 8):
        engine = toy_engine(scheme, pages=24)
        results = list(engine.run(workflow, tasks(10), concurrency))
        found.append({result.index: result for result in results})
        assert engine.stats().pages_held == 0
    for index in range(10):
        alone, together = found[0][index], found[1][index]
        assert alone.task_id == together.task_id == f"t{index}"
        assert alone.result == together.result
        assert alone.trajectories == together.trajectories
        (record,) = together.trajectories
        if index == 3:
            assert together.error is not None
            assert (together.error.type, together.error.message) == ("ValueError", "task t3 is broken")
        else:
            assert together.error is None
            assert [(span.agent, span.end - span.start) for span in record.generated] == [("plan", 4), ("act", 3)]
            assert len(record.token_ids) == len(record.logprobs) == record.generated[-1].end
            assert together.usage.computed > 0


def test_results_come_as_tasks_finish_and_tasks_are_read_as_they_start() -> None:
    engine = toy_engine("base_lr_shared")
    read: list[int] = []

    async def uneven(task: Task, t: Trajectory) -> Task:
        t.append([task["n"]])
        await t.agenerate("plan", max_new_tokens=20 if task["n"] == 0 else 2)
        return task

    def source() -> Iterator[Task]:
        for n in range(6):
            read.append(n)
            yield {"n": n}

    results = engine.run(uneven, source(), concurrency=2)
    first = next(results)
    assert first.index == 1
    assert len(read) < 6
    assert {result.index for result in results} == {0, 2, 3, 4, 5}


def test_stopping_early_gives_all_pages_back() -> None:
    engine = toy_engine("rebase_shared")
    results = engine.run(workflow, tasks(20), concurrency=5)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert engine.stats().pages_held == 0
    engine.check_integrity()
    assert len(list(engine.run(workflow, tasks(2)))) == 2


def test_asynchronous_variant() -> None:
    engine = toy_engine("base_shared")

    async def run() -> list[int]:
        with pytest.raises(RequestError, match="arun"):
            next(iter(engine.run(workflow, tasks(1))))
        return [result.index async for result in engine.arun(workflow, tasks(5))]

    assert sorted(asyncio.run(run())) == [0, 1, 2, 3, 4]


def test_synchronous_calls_inside_a_workflow_serve_the_others_too() -> None:
    engine = toy_engine("rebase_shared")

    async def branching(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, 3, 4, task["n"]])
        await t.agenerate("plan", max_new_tokens=3)
        with t.fork() as branch:
            turn = branch.generate("act", max_new_tokens=4)
        return {"tokens": turn.token_ids}

    results = list(engine.run(branching, [{"n": n} for n in range(6)]))
    assert all(result.error is None for result in results)
    assert engine.stats().pages_held == 0


def test_concurrency_must_be_positive() -> None:
    with pytest.raises(RequestError, match="concurrency"):
        list(toy_engine("base_shared").run(workflow, tasks(1), concurrency=0))


@pytest.mark.parametrize("raised", [SystemExit(3), asyncio.CancelledError()], ids=["exit", "cancelled"])
def test_what_would_end_the_run_stays_in_its_task(raised: BaseException) -> None:
    engine = toy_engine("base_shared")

    async def leaving(task: Task, t: Trajectory) -> Task:
        if task["id"] == "t3":
            raise raised
        return await workflow({**task, "fails": False}, t)

    results = list(engine.run(leaving, tasks(6), concurrency=2))
    assert [result.task_id for result in results if result.error is not None] == ["t3"]
    assert len(results) == 6
    assert engine.stats().pages_held == 0


@pytest.mark.parametrize("where", ["workflow", "step"])
def test_an_interrupt_stops_the_run_and_gives_all_pages_back(where: str) -> None:
    engine = toy_engine("base_shared")
    steps = 0

    def interrupt() -> None:
        nonlocal steps
        steps += 1
        if steps == 9 and where == "step":
            raise KeyboardInterrupt

    async def interrupted(task: Task, t: Trajectory) -> Task:
        if task["id"] == "t3" and where == "workflow":
            raise KeyboardInterrupt
        return await workflow({**task, "fails": False}, t)

    engine.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(interrupted, tasks(9), concurrency=2))
    engine.on_step = None
    assert engine.stats().pages_held == 0
    engine.check_integrity()
    assert len(list(engine.run(workflow, tasks(2)))) == 2
