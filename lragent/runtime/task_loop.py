"""Rollouts: a workflow runs over many tasks at once, and their turns are batched into the engine's steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lragent.errors import RequestError
from lragent.runtime.trajectory import Trajectory
from lragent.runtime.trajectory_state import TurnSegment
from lragent.runtime.usage import Usage

Workflow = Callable[[dict[str, Any], Trajectory], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class TaskError:
    """An exception that a workflow raised."""

    type: str
    message: str


@dataclass(frozen=True)
class RolloutResult:
    """Result of one task.

    Args:
        index: index of the task in the input.
        task_id: the task's "id", or its index if it has none.
        result: return value of the workflow; None if it raised.
        segments, token_ids, logprobs: the trajectory at the end (see `Trajectory`).
        usage: work of the trajectory and its forks.
    """

    index: int
    task_id: Any
    result: dict[str, Any] | None
    error: TaskError | None
    segments: list[TurnSegment]
    token_ids: list[int]
    logprobs: list[float | None]
    usage: Usage


async def run_task(
    new_trajectory: Callable[[], Trajectory], workflow: Workflow, index: int, task: dict[str, Any]
) -> RolloutResult:
    """Runs one task; an exception of the workflow becomes the result's error.

    `sys.exit` and a cancellation inside a workflow are errors of its task too: they must not end other tasks. When the
    run itself is stopped, the results of cancelled tasks are dropped.
    """
    result: dict[str, Any] | None = None
    error: TaskError | None = None
    with new_trajectory() as trajectory:
        try:
            result = await workflow(task, trajectory)
        except (Exception, asyncio.CancelledError, SystemExit) as raised:
            error = TaskError(type(raised).__name__, str(raised))
        return RolloutResult(
            index,
            task.get("id", index),
            result,
            error,
            trajectory.segments(),
            trajectory.token_ids,
            trajectory.logprobs,
            trajectory.usage,
        )


async def arun_workflow(
    new_trajectory: Callable[[], Trajectory],
    workflow: Workflow,
    tasks: Iterable[dict[str, Any]],
    concurrency: int,
) -> AsyncGenerator[RolloutResult, None]:
    """Yields results as tasks finish. At most `concurrency` tasks run at a time; a task is read when it starts."""
    _require_concurrency(concurrency)
    source = enumerate(tasks)
    pending: set[asyncio.Task[RolloutResult]] = set()
    try:
        while True:
            while len(pending) < concurrency:
                following = next(source, None)
                if following is None:
                    break
                pending.add(asyncio.ensure_future(run_task(new_trajectory, workflow, *following)))
            if not pending:
                return
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _require_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise RequestError(f"concurrency is {concurrency}, must be at least 1")


def require_runnable(concurrency: int) -> None:
    """Checks that `run_workflow` can run here, before a caller opens files for its results.

    Raises:
        RequestError: an event loop is running, or `concurrency` is below 1.
    """
    _require_concurrency(concurrency)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RequestError(
        "a synchronous run was started where an event loop is running",
        "Use Engine.arun there, or start the run in another thread (asyncio.to_thread).",
    )


def run_workflow(
    new_trajectory: Callable[[], Trajectory],
    workflow: Workflow,
    tasks: Iterable[dict[str, Any]],
    concurrency: int,
) -> Iterator[RolloutResult]:
    """As `arun_workflow`, from synchronous code, on an event loop of its own."""
    require_runnable(concurrency)
    results = arun_workflow(new_trajectory, workflow, tasks, concurrency)
    loop = asyncio.new_event_loop()
    following: asyncio.Future[RolloutResult] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(results), loop=loop)
            try:
                result = loop.run_until_complete(following)
            except StopAsyncIteration:
                return
            yield result
    finally:
        # A caller that stops early leaves tasks in progress: they are cancelled and release their pages. After Ctrl-C
        # the generator still waits for its next result; errors of interrupted tasks are not reported.
        loop.set_exception_handler(lambda *_: None)
        if following is not None and not following.done():
            following.cancel()
            loop.run_until_complete(asyncio.gather(following, return_exceptions=True))
        loop.run_until_complete(results.aclose())
        for task in asyncio.all_tasks(loop):  # the engine's stepping task
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
