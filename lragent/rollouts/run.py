"""A workflow over a file of tasks, with one result line for every finished task; an interrupted run can be resumed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lragent.errors import RequestError, TaskFileError
from lragent.rollouts.kept_results import Existing, Kept, kept_results
from lragent.rollouts.rescoring import Rescored, Rescorer, rescoring
from lragent.rollouts.result_file import ResultFile, open_results
from lragent.rollouts.result_lines import LinePlace, generated_tokens, result_line, with_json_result
from lragent.rollouts.run_facts import Run, run_of_engine, start_of
from lragent.rollouts.tasks import Task, TaskId, TaskPlace, check_tasks, read_tasks
from lragent.rollouts.workflow_loading import open_workflow
from lragent.runtime import Engine, RolloutResult, Workflow
from lragent.runtime.task_loop import require_runnable

SAMPLE = 0  # the only sample of each task


@dataclass(frozen=True)
class RolloutPlan:
    """A run before it starts.

    Args:
        tasks: all tasks of the file, by id.
        kept: results that stay.
    """

    tasks: Mapping[TaskId, TaskPlace]
    kept: Kept

    @property
    def left(self) -> int:
        """Number of tasks that are still to be run."""
        return len(self.tasks) - self.finished

    @property
    def finished(self) -> int:
        """Number of tasks that have a result that stays."""
        return sum((task, SAMPLE) in self.kept.finished for task in self.tasks)


@dataclass(frozen=True)
class RolloutSummary:
    """Totals of one run.

    Args:
        out: the result file.
        run: digest of the run.
        tasks, kept: tasks in the task file, and those that had a result before the run that stays.
        kept_failed: kept results that are errors.
        older: lines in the file that an older run has written, with another workflow.
        done, failed: tasks that this run finished (failed ones included), and those that failed.
        generated_tokens: tokens that agents wrote in tasks of this run.
        seconds: from the first task to the last result.
        computed: tokens of this run by kind of pass (`lragent.runtime.Usage`), and `ttft` in seconds.
        peak_cache_bytes: largest number of bytes in pages that trajectories held, since the engine was made.
        preemptions: requests of this run that lost their pages.
        rescored: drift of a sample of this run's trajectories; None if the scheme needed no check.
    """

    out: Path
    run: str
    sharing: str
    tasks: int
    kept: int
    kept_failed: int = 0
    older: int = 0
    done: int = 0
    failed: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    computed: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_cache_bytes: int = 0
    preemptions: int = 0
    rescored: Rescored | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second; 0 if nothing was run."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def all_failed(self) -> int:
        """Tasks whose result is an error, in this run or before it."""
        return self.failed + self.kept_failed

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, and `tokens_per_second`."""
        rescored = None if self.rescored is None else self.rescored.to_dict()
        entries = {**dataclasses.asdict(self), "out": str(self.out), "rescored": rescored}
        return {**entries, "tokens_per_second": self.tokens_per_second}


def plan_rollout(tasks: Path, out: Path, existing: Existing, run: Run) -> RolloutPlan:
    """Reads all files to their ends; nothing is run or written.

    Raises:
        RequestError: `tasks` and `out` are one file, or `existing` is none of its words.
        TaskFileError: a file can't be read, a line is broken, `out` exists and `existing` is "refuse", or `out` can't
            be resumed (`lragent.rollouts.kept_results`).
    """
    if existing not in get_args(Existing):
        raise RequestError(f"existing is {existing!r}", f"Use one of {', '.join(get_args(Existing))}.")
    if out.resolve() == tasks.resolve():
        raise RequestError(f"tasks and results are both in {out}", "Write the results to another file.")
    places = check_tasks(tasks)
    return RolloutPlan(places, kept_results(out, existing, run, places))


def nothing_left(out: Path, run: Run, sharing: str, plan: RolloutPlan) -> RolloutSummary:
    """The summary of a run without tasks."""
    return RolloutSummary(
        out=out,
        run=run.digest,
        sharing=sharing,
        tasks=len(plan.tasks),
        kept=plan.finished,
        kept_failed=plan.kept.failed,
        older=plan.kept.older,
    )


def run_rollout(
    engine: Engine,
    workflow: Workflow | str,
    tasks: Path,
    out: Path,
    existing: Existing = "refuse",
    concurrency: int = 32,
    on_result: Callable[[RolloutResult], None] | None = None,
    seed: int = 0,
    rescore: bool = True,
    on_drift: Callable[[Rescored], None] | None = None,
) -> RolloutSummary:
    """Runs the tasks that have no result yet and writes each one's line as soon as it has finished.

    An exception in one task becomes that task's error. If the run is interrupted, the lines written so far stay, and
    `existing="resume"` runs the other tasks.

    Args:
        workflow: the function, or "FILE.py:FUNC".
        tasks: JSON lines, one object a task.
        out: JSON lines, one object a finished task (docs/results.md); the run file is written beside it.
        existing: what happens to a file at `out`: "refuse" raises, "resume" keeps its results, "retry" keeps those that
            are no errors, "overwrite" drops them.
        concurrency: largest number of tasks in progress at a time.
        on_result: called with every result after its line was written.
        seed: the run's; turns that give no seed derive theirs from it.
        rescore: False never rescores (`lragent.rollouts.rescoring`).
        on_drift: called with the drift after each rescored trajectory, on another thread.

    Raises:
        RequestError: `tasks` and `out` are one file, `existing` is none of its words, `concurrency` is below 1, or an
            event loop is running.
        TaskFileError: see `plan_rollout`; `out` can't be written, or another run writes it; the workflow can't be
            loaded.
    """
    require_runnable(concurrency)  # before the result file is emptied
    with open_workflow(workflow) if isinstance(workflow, str) else nullcontext(workflow) as function:
        run = run_of_engine(engine, workflow, seed)
        plan = plan_rollout(tasks, out, existing, run)
        if not plan.left:
            return nothing_left(out, run, engine.sharing, plan)
        before = engine.stats()
        done = failed = generated = 0
        with open_results(out, existing, run, start_of(engine, concurrency), plan.tasks) as file:
            # Another run may have finished tasks before this one got the lock.
            kept = file.kept
            places: dict[int, LinePlace] = {}
            pending = _pending(tasks, kept, run.digest, places)
            started = time.monotonic()
            with rescoring(engine, rescore, on_drift) as rescorer:
                outcomes = engine.run(function, pending, concurrency=concurrency, seed=seed)
                for outcome in map(with_json_result, outcomes):
                    file.write(result_line(outcome, places.pop(outcome.index)))
                    done += 1
                    failed += outcome.error is not None
                    generated += generated_tokens(outcome)
                    if rescorer is not None:
                        rescorer.offer(outcome)
                    if on_result is not None:
                        on_result(outcome)
            seconds = time.monotonic() - started
            rescored = _finished(rescorer, file)
    after = engine.stats()
    earlier = dataclasses.asdict(before.tokens)
    return RolloutSummary(
        out=out,
        run=run.digest,
        sharing=engine.sharing,
        tasks=len(plan.tasks),
        kept=len(plan.tasks) - done,
        kept_failed=kept.failed,
        older=kept.older,
        done=done,
        failed=failed,
        generated_tokens=generated,
        seconds=seconds,
        computed={kind: count - earlier[kind] for kind, count in dataclasses.asdict(after.tokens).items()},
        peak_cache_bytes=after.peak_held_bytes,
        preemptions=after.preemptions - before.preemptions,
        rescored=rescored,
    )


def _finished(rescorer: Rescorer | None, file: ResultFile) -> Rescored | None:
    """The drift of the sample, also written into the run file; None without a rescorer."""
    if rescorer is None:
        return None
    found = rescorer.finish()
    try:
        file.add_to_start({"drift": found.to_dict()})
    except TaskFileError as error:  # the lines are safe, and the summary has the drift
        return dataclasses.replace(found, error=f"{found.error} {error.message}".strip())
    return found


def _pending(tasks: Path, kept: Kept, run: str, places: dict[int, LinePlace]) -> Iterator[Task]:
    """Yields the tasks that have no result yet.

    Args:
        places: receives the place of each task's line, by the number of the task among those that are yielded.
    """
    number = 0
    for place, task in read_tasks(tasks):
        key = (place.id, SAMPLE)
        if key not in kept.finished:
            attempt = kept.run_file.attempts.get(key, 0) + 1
            places[number] = LinePlace(run, place.index, place.digest, attempt)
            number += 1
            yield task
