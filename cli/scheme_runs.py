"""Runs one workflow over the same tasks under several sharing schemes, and compares them in a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lragent.rollouts.result_lines import generated_tokens
from lragent.rollouts.tasks import Task

from .quantities import show_bytes, show_count, show_seconds
from .rollout_progress import RolloutProgress

if TYPE_CHECKING:
    from lragent.runtime import Engine, RolloutResult, Turn, Workflow


@dataclass(frozen=True)
class SchemeRun:
    """Measurements of one run.

    Args:
        exact_match: fraction of tasks whose result has a true "exact_match"; None if no result has that entry.
        generated: tokens that agents wrote.
        prefill, decode, acting, catch_up, adapter_free, replay, rerun: computed tokens by kind of pass.
        reused: tokens that turns found in the cache.
        peak_cache_bytes: largest number of bytes in pages that trajectories held.
        switch_ttft: seconds to the first token, summed over turns that follow a turn of another agent.
        seconds: from the first task to the last result.
        adapters: name of the adapter set, where several are compared; else empty.
    """

    sharing: str
    tasks: int
    failed: int
    exact_match: float | None
    generated: int
    prefill: int
    decode: int
    acting: int
    catch_up: int
    adapter_free: int
    replay: int
    rerun: int
    reused: int
    peak_cache_bytes: int
    switch_ttft: float
    seconds: float
    adapters: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class SwitchTimes:
    """Sums the time to first token of turns that follow a turn of another agent."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, workflow: Workflow) -> Workflow:
        async def watched(task: dict[str, Any], t: Any) -> dict[str, Any]:
            trajectory: Any = _WatchedTrajectory(t, self)
            return await workflow(task, trajectory)

        return watched


class _WatchedTrajectory:
    """A trajectory that reports its turns to `SwitchTimes`."""

    def __init__(self, trajectory: Any, times: SwitchTimes) -> None:
        self._trajectory = trajectory
        self._times = times
        self._last: str | None = None

    async def agenerate(self, agent: str, **options: Any) -> Turn:
        turn: Turn = await self._trajectory.agenerate(agent, **options)
        if self._last not in (None, agent):
            self._times.seconds += turn.usage.ttft
        self._last = agent
        return turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trajectory, name)


def run_scheme(
    engine: Engine,
    workflow: Workflow,
    tasks: Sequence[Task],
    concurrency: int,
    keep: Callable[[RolloutResult], None] | None = None,
    adapters: str = "",
) -> SchemeRun:
    """Runs all tasks and measures; `keep` is called with every result."""
    before = dataclasses.asdict(engine.stats().tokens)
    times = SwitchTimes()
    generated = 0
    matches: list[bool] = []
    with RolloutProgress(engine, len(tasks), f"{engine.sharing} {adapters}".rstrip()) as bar:
        for outcome in engine.run(times.watch(workflow), tasks, concurrency=concurrency):
            bar.count(outcome)
            generated += generated_tokens(outcome)
            if outcome.result is not None and "exact_match" in outcome.result:
                matches.append(bool(outcome.result["exact_match"]))
            if keep is not None:
                keep(outcome)
    stats = engine.stats()
    after = dataclasses.asdict(stats.tokens)
    return SchemeRun(
        sharing=engine.sharing,
        tasks=len(tasks),
        failed=bar.failed,
        exact_match=sum(matches) / len(tasks) if matches else None,
        generated=generated,
        peak_cache_bytes=stats.peak_held_bytes,
        switch_ttft=times.seconds,
        seconds=bar.seconds,
        adapters=adapters,
        **{kind: after[kind] - before[kind] for kind in after if kind != "ttft"},
    )


def comparison_table(runs: Sequence[SchemeRun], title: str) -> Table:
    """One column a run. Rows without information are left out: matches, failures and repeated passes."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(f"{run.sharing}\n{run.adapters}".rstrip(), justify="right", no_wrap=True)
    for label, cells in _rows(runs):
        table.add_row(label, *cells)
    return table


def _rows(runs: Sequence[SchemeRun]) -> Iterator[tuple[str, list[str]]]:
    if any(run.exact_match is not None for run in runs):
        yield "exact match", [f"{run.exact_match:.1%}" if run.exact_match is not None else "-" for run in runs]
    if any(run.failed for run in runs):
        yield "tasks failed", [str(run.failed) for run in runs]
    yield "tokens generated", [show_count(run.generated) for run in runs]
    yield "computed: prefill", [show_count(run.prefill) for run in runs]
    yield "computed: decode", [show_count(run.decode) for run in runs]
    if any(run.acting for run in runs):
        yield "computed: acting rows", [show_count(run.acting) for run in runs]
    yield "computed: catch-up", [show_count(run.catch_up) for run in runs]
    yield "computed: adapter-free", [show_count(run.adapter_free) for run in runs]
    if any(run.replay or run.rerun for run in runs):
        yield "computed: again", [show_count(run.replay + run.rerun) for run in runs]
    yield "tokens reused", [show_count(run.reused) for run in runs]
    yield "cache at peak", [show_bytes(run.peak_cache_bytes) for run in runs]
    yield "first token, switches", [show_seconds(run.switch_ttft) for run in runs]
    yield "generated a second", [f"{run.generated / run.seconds:.1f}" for run in runs]
    yield "wall time", [show_seconds(run.seconds) for run in runs]
