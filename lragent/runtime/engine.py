"""The engine: a program, a cache, a sharing scheme, and the trajectories that agents work on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lragent.errors import InternalError, RequestError
from lragent.program.agent import BASE
from lragent.program.live_adapters import GivenAdapter
from lragent.program.program import Program
from lragent.runtime.cache import memory
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.cache.write_log import log_end
from lragent.runtime.config import EngineConfig
from lragent.runtime.evidence import Evidence
from lragent.runtime.loop import EngineLoop
from lragent.runtime.make_request import RequestMaker
from lragent.runtime.roster import Roster
from lragent.runtime.schemes import Scheme
from lragent.runtime.seeds import SeedPath
from lragent.runtime.stats import EngineStats
from lragent.runtime.task_loop import RolloutResult, Workflow, arun_workflow, run_workflow
from lragent.runtime.task_scope import running_task
from lragent.runtime.trajectory import Trajectory
from lragent.runtime.trajectory_state import StartText, TrajectoryState
from lragent.runtime.update_adapters import VersionInUse, place, read_all, updated
from lragent.runtime.usage import Usage
from lragent.text.tokenizer import Tokenizer


class Engine:
    """Runs turns of agents over shared cache pages.

    Args:
        program: the lowered model; its schema must have the layout of the sharing scheme.
        tokenizer: needed for text and stop strings.
        saver: writes the model as an artifact to a path, for `save`.
        evidence: the reason to trust the sharing scheme; None: there is none, unless the scheme is `non_shared`.

    Raises:
        RequestError: a program of another layout, or an unknown agent.
        CacheMemoryError: `config.kv_memory` has no room for a page.
    """

    def __init__(
        self,
        program: Program,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        saver: Callable[[Path], None] | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        scheme = config.scheme
        _check_program(program, scheme)
        self._saver = saver
        self._evidence = evidence or Evidence("exact" if scheme.page_table_per_agent else "none")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        acting, spare = _acting(program, config.agents), _spare(program, config.spare)
        schema = program.schema.holding((*acting, *spare))
        sizes = memory.page_bytes(schema, scheme.lr_blocks, config.page_size, config.kv_dtype)
        pages = memory.pages_that_fit(config.kv_memory, sizes)
        # Memory first: the system may refuse so many pages.
        tensors = memory.allocate(
            schema, scheme.lr_blocks, pages, config.page_size, config.kv_dtype, torch.device(config.device)
        )
        cache = SharedCache.empty(pages, sizes, config.page_size, track_lr=scheme.own_lr_only)
        slots = enumerate(program.schema.agents, 1)
        held = frozenset(slot for slot, name in slots if scheme.layout == "dense" or name in (*acting, *spare))
        self._make = RequestMaker(
            program=program,
            scheme=scheme,
            cache=cache,
            tokenizer=tokenizer,
            stop_token_ids=frozenset(config.stop_token_ids),
            roster=Roster.of(program.agents, scheme, acting, held),
        )
        self._kv_dtype = config.kv_dtype
        # Of trajectories outside a run.
        self._seeds = SeedPath(0, None, 0, ())
        self._opened = 0
        self._loop = EngineLoop(
            program=program,
            scheme=scheme,
            memory=tensors,
            cache=cache,
            agents=len(program.agents) + 1,
            max_batch_tokens=config.max_batch_tokens,
        )

    @property
    def agents(self) -> tuple[str, ...]:
        """Names of all agents that may act, `base` first."""
        return self._make.roster.acting

    @property
    def sharing(self) -> str:
        return self._loop.scheme.name

    @property
    def evidence(self) -> Evidence:
        """The reason to trust the sharing scheme; that of adapters that were updated is not known."""
        if not self._make.roster.updates or self._evidence.reason == "exact":
            return self._evidence
        return Evidence(max_kl=self._evidence.max_kl)

    @property
    def kv_dtype(self) -> torch.dtype:
        return self._kv_dtype

    @property
    def program(self) -> Program:
        """The program, with the agents' newest adapters."""
        return updated(self._loop.program, self._make.roster)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._make.tokenizer

    @property
    def on_step(self) -> Callable[[], None] | None:
        """Called after every step, for tests and monitors."""
        return self._loop.on_step

    @on_step.setter
    def on_step(self, hook: Callable[[], None] | None) -> None:
        self._loop.on_step = hook

    def trajectory(self, start: str | Sequence[int] | None = None) -> Trajectory:
        """A new trajectory that starts with text, token ids, or nothing.

        The text is encoded as transformers does, special tokens added; a BOS that it begins with isn't added again. So
        a chat template that was rendered can be given. Close the trajectory, or use it as a context manager, to
        release its pages. In a workflow, it belongs to the task and is closed with it.
        """
        task = running_task()
        ids = [] if start is None else self._make.start(start)
        if task is not None:
            task.require_running()
            seeds = task.next_seeds()
        else:
            seeds = self._seeds.child(self._opened)
            self._opened += 1
        state = TrajectoryState(seeds, task)
        state.append(ids)
        state.start = StartText(start, len(ids)) if isinstance(start, str) else None
        self._loop.open(state)
        trajectory = Trajectory(self._loop, self._make, state)
        if task is not None:
            task.trajectories[trajectory] = None
        return trajectory

    def run(
        self, workflow: Workflow, tasks: Iterable[dict[str, Any]], concurrency: int = 32, seed: int = 0
    ) -> Iterator[RolloutResult]:
        """Runs a workflow over tasks, `concurrency` at a time, and yields results as they finish.

        Args:
            tasks: tasks with an equal "id" are samples of one task, and draw different samples.
            seed: the run's; turns that give no seed derive theirs from it, so that a run can be repeated.

        Raises:
            RequestError: called where an event loop is running; use `arun` there.
        """
        return run_workflow(self.trajectory, workflow, tasks, concurrency, seed)

    def arun(
        self, workflow: Workflow, tasks: Iterable[dict[str, Any]], concurrency: int = 32, seed: int = 0
    ) -> AsyncIterator[RolloutResult]:
        """As `run`, from asynchronous code."""
        return arun_workflow(self.trajectory, workflow, tasks, concurrency, seed)

    def update_adapters(self, adapters: Mapping[str, GivenAdapter]) -> dict[str, str]:
        """Gives agents new adapters, in memory and in one step, without compiling (docs/rl.md).

        Open trajectories keep the version of each agent that has acted on them. While there are any, the new version
        takes a spare slot; else it takes the place of the version before. Pages of the cache are found again as far as
        they hold nothing of what has changed.

        Args:
            adapters: agent name -> its new adapter: in memory, or the directory of a PEFT adapter.

        Returns:
            Agent name -> digest of its new adapter.

        Raises:
            AdapterError: an adapter can't be read, or does not fit any slot; names agent, module and reason.
            VersionInUse: open trajectories use a present version, and no slot is spare.
            RequestError: an unknown agent, or a program whose adapters can't be changed.
            On any error, nothing has changed.
        """
        return place(self._loop, self._make.roster, read_all(self._loop.program, self._make.roster, adapters))

    async def aupdate_adapters(self, adapters: Mapping[str, GivenAdapter]) -> dict[str, str]:
        """As `update_adapters`; waits until enough trajectories are closed, instead of raising VersionInUse."""
        given = read_all(self._loop.program, self._make.roster, adapters)
        while True:
            try:
                return place(self._loop, self._make.roster, given)
            except VersionInUse:
                await self._loop.closed()

    def save(self, path: str | Path) -> None:
        """Writes the model as an artifact.

        Raises:
            RequestError: the engine was opened from an artifact, or its adapters were updated.
        """
        if self._saver is None:
            raise RequestError("this engine has nothing to save", "It was opened from an artifact: copy that.")
        if self._make.roster.updates:
            raise RequestError("this engine's adapters were updated", "Save the adapters and convert the model.")
        self._saver(Path(path))

    def stats(self) -> EngineStats:
        loop, pool = self._loop, self._loop.cache.pool
        tokens = Usage()
        tokens.add(loop.usage)
        return EngineStats(
            tokens=tokens,
            turns=loop.turns,
            steps=loop.steps,
            held_bytes=pool.held_bytes,
            peak_held_bytes=pool.peak_bytes,
            cached_bytes=pool.cached * pool.sizes.total,
            pages=pool.total,
            pages_free=pool.free,
            pages_held=pool.held,
            pages_cached=pool.cached,
            page_size=loop.cache.page_size,
            page_bytes=pool.sizes.total,
            preemptions=loop.scheduler.preemptions,
            dropped_tables=loop.scheduler.dropped_tables,
            evictions=pool.evictions,
        )

    def check_integrity(self) -> None:
        """Checks that pages, holders, index, page tables and claims agree.

        Raises:
            InternalError: they disagree; the message gives the numbers.
        """
        loop = self._loop
        tables = [table for state in loop.states for table in state.page_tables.values()]
        loop.cache.pool.check(table.pages for table in tables)
        for table in tables:
            wanted = loop.cache.pages_for(table.computed)
            if len(table.pages) != wanted:
                raise InternalError(f"{table.computed} computed tokens in {len(table.pages)} != {wanted} pages")
            if not table.settled <= table.computed <= log_end(table.log):
                raise InternalError(
                    f"not settled {table.settled} <= computed {table.computed} <= write log {table.log}"
                )
        loop.cache.claims.check(loop.scheduler.running)


def _check_program(program: Program, scheme: Scheme) -> None:
    if program.schema.layout != scheme.layout:
        raise RequestError(
            f"sharing scheme {scheme.name} needs the {scheme.layout} cache layout, the program has "
            f"{program.schema.layout}",
            f"Lower the model for the {scheme.layout} layout.",
        )
    names = tuple(agent.name for agent in program.agents)
    if names != program.schema.agents:
        raise InternalError(f"the program's agents {names} aren't those of its cache schema {program.schema.agents}")
    if BASE in names or len(set(names)) != len(names):
        raise RequestError(f"agent names {names} must differ from each other and from {BASE!r}")


def _acting(program: Program, agents: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the requested agents, in the program's order. Spare agent slots are left out."""
    known = tuple(agent.name for agent in program.agents if not agent.spare)
    if agents is None:
        return known
    for name in agents:
        if name not in known and name != BASE:
            raise RequestError(f"unknown agent {name!r}", f"Agents are: {', '.join((BASE, *known))}.")
    return tuple(name for name in known if name in agents)


def _spare(program: Program, count: int) -> tuple[str, ...]:
    """Names of the first spare agent slots; RequestError if the program has fewer."""
    spare = tuple(agent.name for agent in program.agents if agent.spare)
    if count > len(spare):
        raise RequestError(
            f"spare is {count}, the program has {len(spare)} spare agent slots",
            f"Convert with --spare {count}.",
        )
    return spare[:count]
