"""The engine's loop: one `step` schedules, runs the program, records what was written, and samples.

Only one thread steps. A synchronous call steps until its own request is done; other requests advance with it.
Asynchronous calls share one task that steps while there are requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field

import torch

from lragent.errors import STOPS, InternalError, RequestError
from lragent.program.program import Program
from lragent.runtime.cache.memory import CacheMemory
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.request import Request
from lragent.runtime.sampling.take_logits import take_logits
from lragent.runtime.scheduling.batch import build_step
from lragent.runtime.scheduling.bookkeeping import record_piece
from lragent.runtime.scheduling.scheduler import Scheduler
from lragent.runtime.schemes import Scheme
from lragent.runtime.trajectory_state import TrajectoryState, TurnSegment
from lragent.runtime.usage import Usage


@dataclass(eq=False)
class EngineLoop:
    """State of an engine and its step.

    Args:
        agents: N + 1, `base` and spare slots included.
        on_step: called after every step, for tests and monitors.
        states: open trajectories, in order of creation.
        active: the request in progress of each trajectory that has one.
    """

    program: Program
    scheme: Scheme
    memory: CacheMemory
    cache: SharedCache
    agents: int
    max_batch_tokens: int
    on_step: Callable[[], None] | None = None
    states: dict[TrajectoryState, None] = field(default_factory=dict)
    active: dict[TrajectoryState, Request] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    turns: int = 0
    steps: int = 0
    pump: asyncio.Task[None] | None = None
    waiting_for_close: list[asyncio.Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.scheme, self.cache, self.max_batch_tokens, self.states.keys())

    def open(self, state: TrajectoryState) -> None:
        """Adds a trajectory; its pages may be dropped when memory runs out."""
        self.states[state] = None

    def fork(self, state: TrajectoryState) -> TrajectoryState:
        """Opens a second trajectory with the same tokens and pages."""
        copy = state.fork(self.cache)
        self.open(copy)
        return copy

    def truncate(self, state: TrajectoryState, length: int) -> None:
        """Keeps the first `length` tokens of a trajectory."""
        state.cut(length, self.cache)

    def close(self, state: TrajectoryState) -> None:
        """Releases a trajectory's pages; a request in progress ends with RequestError."""
        active = self.active.get(state)
        if active is not None:
            self.end(active, RequestError("the trajectory was closed during a turn"))
        state.close(self.cache)
        self.states.pop(state, None)
        for waiter in self.waiting_for_close:
            if not waiter.done():
                waiter.set_result(None)
        self.waiting_for_close.clear()

    async def closed(self) -> None:
        """Waits until a trajectory is closed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting_for_close.append(waiter)
        await waiter

    def is_busy(self, state: TrajectoryState) -> bool:
        """True while a request of the trajectory is in progress."""
        return state in self.active

    def submit(self, request: Request) -> None:
        self.active[request.state] = request
        self.scheduler.submit(request)

    def step(self) -> None:
        """Runs one step.

        Raises:
            BaseException: the error of the program or of `on_step`, or InternalError; all requests in progress end with
                it.
        """
        error = self._step_error()
        if error is not None:
            raise error

    def _step_error(self) -> BaseException | None:
        """Runs one step. Its error ends all requests in progress, and is returned.

        An error that is no Exception (a panic of a library written in Rust) is an error of the step too; what stops a
        process is not.
        """
        try:
            self._step()
            if self.on_step is not None:
                self.on_step()
        except STOPS:
            raise
        except BaseException as error:
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self.end(request, error)
            return error
        return None

    def _step(self) -> None:
        entries = self.scheduler.schedule()
        failed = [request for request in self.scheduler.running if request.error is not None]
        for request in failed:
            self.end(request, request.error)
        if not entries:
            if not self._end_settled() and not failed:
                raise InternalError(
                    f"nothing to run with {len(self.scheduler.waiting)} requests waiting and "
                    f"{len(self.scheduler.running)} running"
                )
            return
        sources, targets = [], []
        for entry in entries:
            sources += [source for source, _ in entry.copies]
            targets += [target for _, target in entry.copies]
        self.memory.copy_pages(sources, targets)
        step = build_step(entries, self.agents - 1, self.cache.page_size)
        with torch.inference_mode():
            logits_RV = self.program.run(step, self.memory.tensors)
        self.steps += 1
        for entry in entries:
            for piece in entry.pieces:
                record_piece(entry.request, piece, self.scheme, self.cache)
        self.cache.pool.note_peak()
        done = take_logits(entries, logits_RV, self.scheme, self.agents, self.program.max_positions)
        for request in done:
            self.end(request, request.error)
        self._end_settled()

    def _end_settled(self) -> bool:
        """Ends requests that only make tokens final and have no spans left; False if there are none."""
        settled = [request for request in self.scheduler.running if request.agent is None and not request.spans]
        for request in settled:
            self.end(request)
        return bool(settled)

    def end(self, request: Request, error: BaseException | None = None) -> None:
        """Ends a request. After an error its trajectory is as before the turn."""
        if request.done and self.active.get(request.state) is not request:
            return
        self.scheduler.leave(request)
        state = request.state
        self.active.pop(state, None)
        if error is not None:
            state.cut(request.prompt, self.cache)
            # Roll back: the next agent becomes the writer of these tokens. The pages may be half written.
            request.table.cut(request.turn_start, self.cache)
            request.table.drop(self.cache)
        elif request.token_ids:
            version = state.version_in(request.agent or 0)
            state.segments.append(
                TurnSegment(
                    agent=version.agent,
                    start=request.prompt,
                    end=len(state.tokens),
                    seed=request.seed,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                    adapter=version.digest,
                )
            )
            state.turns += 1
            self.turns += 1
        self.usage.add(request.usage)
        state.usage.add(request.usage)
        if state.task is not None:
            state.task.usage.add(request.usage)
        request.finish(error)

    def drive(self, request: Request) -> None:
        """Steps until a request is done; raises its error."""
        while not request.done:
            self.step()
        if request.error is not None:
            raise request.error

    async def wait(self, request: Request) -> None:
        """Waits until a request is done and raises its error. Requests that are awaited together run together.

        If the caller is cancelled, the request ends.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        request.on_done = wake
        if request.done:
            wake()
        elif self.pump is None or self.pump.done() or self.pump.get_loop() is not loop:
            # In a context of its own: it serves all tasks of a run.
            self.pump = Context().run(loop.create_task, self._pump())
        try:
            await future
        except asyncio.CancelledError:
            if not request.done:
                self.end(request, RequestError("the turn was cancelled"))
            raise
        if request.error is not None:
            raise request.error

    async def _pump(self) -> None:
        while self.scheduler.waiting or self.scheduler.running:
            # After an error every request has ended with it, and its caller raises it.
            if self._step_error() is None:
                # Callers whose turn is done may submit the next one before the next step.
                await asyncio.sleep(0)
