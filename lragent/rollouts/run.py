"""A workflow over a file of tasks, with one result line for every finished task; an interrupted run can be resumed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lragent.errors import RequestError
from lragent.rollouts.jsonl import Existing, ResultFile, check_tasks, finished_ids, pending_tasks
from lragent.rollouts.result_lines import generated_tokens, result_line, with_json_result
from lragent.runtime import Engine, RolloutResult, Workflow
from lragent.runtime.task_loop import require_runnable


@dataclass(frozen=True)
class RolloutPlan:
    """Number of tasks in a file, and of those that have a result already."""

    tasks: int
    kept: int

    @property
    def left(self) -> int:
        return self.tasks - self.kept


@dataclass(frozen=True)
class RolloutSummary:
    """Totals of one run.

    Args:
        out: the result file.
        tasks, kept: tasks in the task file, and those that had a result before the run.
        done, failed: tasks that this run finished (failed ones included), and those that failed.
        generated_tokens: tokens that agents wrote in tasks of this run.
        seconds: from the first task to the last result.
        computed: tokens of this run by kind of pass (`lragent.runtime.Usage`), and `ttft` in seconds.
        peak_cache_bytes: largest number of bytes in pages that trajectories held, since the engine was made.
        preemptions: requests of this run that lost their pages.
    """

    out: Path
    sharing: str
    tasks: int
    kept: int
    done: int = 0
    failed: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    computed: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_cache_bytes: int = 0
    preemptions: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second; 0 if nothing was run."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, and `tokens_per_second`."""
        return {**dataclasses.asdict(self), "out": str(self.out), "tokens_per_second": self.tokens_per_second}


def plan_rollout(tasks: Path, out: Path, existing: Existing) -> RolloutPlan:
    """Reads both files to their ends and counts; nothing is run or written.

    Raises:
        RequestError: `tasks` and `out` are one file, or `existing` is none of the three words.
        TaskFileError: a file can't be read, a line is broken, or `out` exists and `existing` is "refuse".
    """
    if existing not in get_args(Existing):
        raise RequestError(f"existing is {existing!r}", f"Use one of {', '.join(get_args(Existing))}.")
    if out.resolve() == tasks.resolve():
        raise RequestError(f"tasks and results are both in {out}", "Write the results to another file.")
    ids = set(check_tasks(tasks))
    return RolloutPlan(len(ids), len(ids & finished_ids(out, existing)))


def run_rollout(
    engine: Engine,
    workflow: Workflow,
    tasks: Path,
    out: Path,
    existing: Existing = "refuse",
    concurrency: int = 32,
    on_result: Callable[[RolloutResult], None] | None = None,
) -> RolloutSummary:
    """Runs the tasks that have no result yet and writes each one's line as soon as it has finished.

    An exception in one task becomes that task's error. If the run is interrupted, the lines written so far stay, and
    `existing="resume"` runs the other tasks.

    Args:
        tasks: JSON lines, one object a task.
        out: JSON lines, one object a finished task (`lragent.rollouts.result_lines`).
        existing: what happens to a file at `out`: "refuse" raises, "resume" keeps its results, "overwrite" drops them.
        concurrency: largest number of tasks in progress at a time.
        on_result: called with every result after its line was written.

    Raises:
        RequestError: `tasks` and `out` are one file, `existing` is none of the three words, `concurrency` is below 1,
            or an event loop is running.
        TaskFileError: see `plan_rollout`; `out` can't be written, or another run writes it.
    """
    require_runnable(concurrency)  # before the result file is emptied
    plan = plan_rollout(tasks, out, existing)
    if not plan.left:
        return RolloutSummary(out, engine.sharing, plan.tasks, plan.kept)
    before = engine.stats()
    done = failed = generated = 0
    with ResultFile(out, existing) as file:
        # Another run may have finished tasks before this one got the lock.
        pending = pending_tasks(tasks, file.finished)
        started = time.monotonic()
        for outcome in map(with_json_result, engine.run(workflow, pending, concurrency=concurrency)):
            file.write(result_line(outcome))
            done += 1
            failed += outcome.error is not None
            generated += generated_tokens(outcome)
            if on_result is not None:
                on_result(outcome)
        seconds = time.monotonic() - started
    after = engine.stats()
    earlier = dataclasses.asdict(before.tokens)
    return RolloutSummary(
        out=out,
        sharing=engine.sharing,
        tasks=plan.tasks,
        kept=plan.tasks - done,
        done=done,
        failed=failed,
        generated_tokens=generated,
        seconds=seconds,
        computed={kind: count - earlier[kind] for kind, count in dataclasses.asdict(after.tokens).items()},
        peak_cache_bytes=after.peak_held_bytes,
        preemptions=after.preemptions - before.preemptions,
    )
