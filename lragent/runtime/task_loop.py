"""Rollouts: a workflow runs over many tasks at once, and their turns are batched into the engine's steps."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lragent.errors import InternalError, RequestError
from lragent.runtime.record import TrajectoryRecord
from lragent.runtime.seeds import SeedPath
from lragent.runtime.task_error import TaskError, task_error
from lragent.runtime.task_scope import TaskScope, running_task
from lragent.runtime.trajectory import Trajectory
from lragent.runtime.usage import Usage

Workflow = Callable[[dict[str, Any], Trajectory], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class RolloutResult:
    """Result of one task.

    Args:
        index: index of the task in the input.
        task_id: the task's "id", or its index if it has none.
        sample: number of earlier tasks of the run with the same id.
        result: return value of the workflow; None if it raised.
        trajectories: the trajectory that the workflow was given, then forks and other trajectories of the task that
            were open when it ended, in order of opening.
        usage: work of all trajectories of the task.
    """

    index: int
    task_id: Any
    sample: int
    result: dict[str, Any] | None
    error: TaskError | None
    trajectories: list[TrajectoryRecord]
    usage: Usage


@dataclass(eq=False)
class _Run:
    """State of a run.

    Args:
        stopping: True once the run cancels its tasks.
        finished: results of tasks that have ended and are still to be yielded, by index.
    """

    new_trajectory: Callable[[], Trajectory]
    workflow: Workflow
    seed: int
    stopping: bool = False
    finished: dict[int, RolloutResult] = field(default_factory=dict)

    async def task(self, index: int, task: dict[str, Any], sample: int) -> None:
        """Runs one task in an asyncio task of its own; an exception of the workflow becomes the result's error.

        Only KeyboardInterrupt and GeneratorExit go on. A cancellation is the run's while the run is stopping, and else
        the workflow's own.
        """
        result: dict[str, Any] | None = None
        error: TaskError | None = None
        task_id = task.get("id", index)
        scope = TaskScope(SeedPath(self.seed, task_id, sample, ()))
        scope.enter()
        try:
            trajectory = self.new_trajectory()
            try:
                result = await self.workflow(task, trajectory)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as raised:
                if self.stopping and isinstance(raised, asyncio.CancelledError):
                    raise
                error = task_error(raised, raised.__traceback__ and raised.__traceback__.tb_next)
            open_at_end = (other.record() for other in scope.trajectories if other is not trajectory)
            records = [trajectory.record(), *open_at_end]
            self.finished[index] = RolloutResult(index, task_id, sample, result, error, records, scope.usage)
        finally:
            scope.close()


async def arun_workflow(
    new_trajectory: Callable[[], Trajectory],
    workflow: Workflow,
    tasks: Iterable[dict[str, Any]],
    concurrency: int,
    seed: int,
) -> AsyncGenerator[RolloutResult, None]:
    """Yields results as tasks finish. At most `concurrency` tasks run at a time; a task is read when it starts."""
    _require_concurrency(concurrency)
    run = _Run(new_trajectory, workflow, seed)
    source = enumerate(tasks)
    samples: Counter[str] = Counter()
    pending: dict[asyncio.Future[None], int] = {}
    try:
        while True:
            while len(pending) < concurrency:
                following = next(source, None)
                if following is None:
                    break
                index, task = following
                name = json.dumps(task.get("id", index), default=repr)
                pending[asyncio.ensure_future(run.task(index, task, samples[name]))] = index
                samples[name] += 1
            if not pending:
                return
            finished, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in finished:
                result = run.finished.pop(pending.pop(future), None)
                if result is None:
                    future.result()  # raises the exception that ends the run
                    raise InternalError("a task has ended without a result")
                yield result
    finally:
        run.stopping = True
        for future in pending:
            future.cancel()
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
    seed: int,
) -> Iterator[RolloutResult]:
    """As `arun_workflow`, from synchronous code, on an event loop of its own."""
    require_runnable(concurrency)
    results = arun_workflow(new_trajectory, workflow, tasks, concurrency, seed)
    loop = asyncio.new_event_loop()
    children = _children(loop)
    following: asyncio.Future[RolloutResult] | None = None
    try:
        while True:
            if following is None or following.done():
                following = asyncio.ensure_future(anext(results), loop=loop)
            try:
                result = loop.run_until_complete(following)
            except StopAsyncIteration:
                return
            except SystemExit as raised:
                # asyncio lets it out of the loop where a task raises it. The workflow that awaits the task gets it too.
                if following.done() or not any(_ended_with(child, raised) for child in children):
                    raise
                continue
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


def _children(loop: asyncio.AbstractEventLoop) -> weakref.WeakSet[asyncio.Task[Any]]:
    """The asyncio tasks that workflows will start on a loop."""
    children: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def start(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        if running_task() is not None:
            children.add(task)
        return task

    loop.set_task_factory(start)  # type: ignore[arg-type]
    return children


def _ended_with(task: asyncio.Task[Any], error: BaseException) -> bool:
    return task.done() and not task.cancelled() and task.exception() is error
