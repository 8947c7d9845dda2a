"""Any exception of a workflow is its task's error, and ends no other task."""

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lragent.runtime import RolloutResult, Trajectory
from lragent.runtime.task_error import MOST_CAUSES, MOST_CHARACTERS, task_error
from tests.runtime.random_operations import toy_engine

Task = dict[str, Any]


class Panic(BaseException):
    """As PyO3's PanicException: no Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Loud(Exception):
    def __str__(self) -> str:
        raise Panic("in str")


async def failing() -> None:
    raise ConnectionError("search is down")


async def leaving() -> None:
    sys.exit(3)


async def panic(t: Trajectory) -> None:
    raise Panic("index out of bounds")


async def mute(t: Trajectory) -> None:
    raise Mute


async def loud(t: Trajectory) -> None:
    raise Loud from Mute()


async def exits(t: Trajectory) -> None:
    sys.exit(3)


async def group(t: Trajectory) -> None:
    turn, tool = asyncio.create_task(t.agenerate("plan", max_new_tokens=30)), asyncio.create_task(failing())
    await asyncio.wait([tool])
    turn.cancel()
    raise MakeGroup("tools failed", [await exception_of(tool), MakeGroup("inner", [KeyError("k"), ValueError("v")])])


async def child_exits(t: Trajectory) -> None:
    await asyncio.gather(leaving(), t.agenerate("plan", max_new_tokens=5))


async def cancels_itself(t: Trajectory) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await t.agenerate("plan", max_new_tokens=5)


async def cancelled_child(t: Trajectory) -> None:
    turn = asyncio.create_task(t.agenerate("plan", max_new_tokens=30))
    await asyncio.sleep(0)
    turn.cancel()
    await turn


class MakeGroup(Exception):
    """As ExceptionGroup, which Python 3.10 lacks."""

    def __init__(self, message: str, exceptions: list[BaseException]) -> None:
        super().__init__(message)
        self.exceptions = tuple(exceptions)


async def exception_of(task: "asyncio.Task[None]") -> BaseException:
    found = task.exception()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (panic, "Panic", "index out of bounds"),
        (mute, "Mute", "(no text: its str() raised ValueError)"),
        (loud, "Loud", "(no text: its str() raised Panic)"),
        (exits, "SystemExit", "3"),
        (
            group,
            "MakeGroup",
            "tools failed: ConnectionError: search is down; KeyError: 'k'; ValueError: v",
        ),
        (child_exits, "SystemExit", "3"),
        (cancels_itself, "CancelledError", ""),
        (cancelled_child, "CancelledError", ""),
    ],
)
def test_what_a_workflow_raises_is_its_own_error(fails: Any, kind: str, message: str) -> None:
    engine = toy_engine("base_lr_shared", pages=60)

    async def workflow(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, 3, task["id"]])
        if task["id"] == 3:
            await fails(t)
        return {"ids": (await t.agenerate("plan", max_new_tokens=6)).token_ids}

    results = {result.index: result for result in engine.run(workflow, [{"id": i} for i in range(8)], concurrency=3)}
    assert [index for index, result in results.items() if result.error is not None] == [3]
    error = results[3].error
    assert error is not None and (error.type, error.message) == (kind, message)
    assert len(results) == 8 and engine.stats().pages_held == 0
    assert kind == "CancelledError" or f"in {fails.__name__}" in error.traceback
    engine.check_integrity()


def test_a_workflow_that_is_cancelled_after_its_last_await_has_its_result() -> None:
    async def workflow(task: Task, t: Trajectory) -> Task:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        return {"n": task["id"]}

    results = list(toy_engine("base_lr_shared").run(workflow, [{"id": i} for i in range(3)]))
    assert sorted(result.result["n"] for result in results if result.result) == [0, 1, 2]


def test_while_a_run_stops_cancellations_are_its_own() -> None:
    engine = toy_engine("base_lr_shared")
    seen: list[str] = []

    async def workflow(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, task["id"]])
        try:
            await t.agenerate("plan", max_new_tokens=2 if task["id"] == 0 else 40)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return {}

    results: Iterator[RolloutResult] = engine.run(workflow, [{"id": i} for i in range(3)])
    assert next(results).index == 0
    results.close()  # type: ignore[attr-defined]
    assert seen == ["cancelled"] * 2
    assert engine.stats().pages_held == 0


def test_causes_are_named_once_and_in_order() -> None:
    def raised() -> BaseException:
        try:
            try:
                {}["town"]  # type: ignore[index]
            except KeyError as error:
                raise MakeGroup("two", [OSError(2, "gone"), MakeGroup("one", [error])]) from error
        except MakeGroup as group:
            return group
        raise AssertionError

    error = task_error(raised(), None)
    assert [(cause.type, cause.message) for cause in error.causes] == [
        ("FileNotFoundError", "[Errno 2] gone"),
        ("MakeGroup", "one"),
        ("KeyError", "'town'"),
    ]
    assert "KeyError: 'town'" in error.traceback


def test_endless_and_huge_errors_are_cut() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert [cause.message for cause in task_error(first, None).causes] == ["b"]
    many = MakeGroup("m", [ValueError(str(i)) for i in range(500)])
    error = task_error(many, None)
    assert len(error.causes) == MOST_CAUSES
    huge = task_error(ValueError("x" * 50_000_000), None)
    assert len(huge.message) == len(huge.traceback) == MOST_CHARACTERS
    assert huge.message.endswith("...") and huge.traceback.startswith("...")
    json.dumps(error.message)


def test_a_panic_in_a_step_ends_the_turns_in_progress_and_not_the_run() -> None:
    engine = toy_engine("base_lr_shared")
    steps = iter(range(10**6))

    def monitor() -> None:
        if next(steps) == 2:
            raise Panic("in a step")

    engine.on_step = monitor

    async def workflow(task: Task, t: Trajectory) -> Task:
        t.append([1, 2, 3])
        await t.agenerate("plan", max_new_tokens=4)
        return {}

    results = list(engine.run(workflow, [{"id": i} for i in range(6)], concurrency=2))
    assert sorted(result.error.type for result in results if result.error) == ["Panic", "Panic"]
    assert len(results) == 6
    engine.on_step = None
    engine.check_integrity()
