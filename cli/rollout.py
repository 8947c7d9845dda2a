"""`lragent rollout`: a workflow over a file of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lragent.program.defaults import KV_MEMORY

from .engine_options import (
    Agents,
    AllowCompiled,
    ArtifactArgument,
    AsJson,
    Attention,
    Backend,
    Concurrency,
    Device,
    EngineOptions,
    KvMemory,
    MaxBatchTokens,
    Sharing,
    Threads,
)
from .output import print_json, results
from .quantities import show_bytes, show_count, show_seconds
from .result_lines import result_line
from .rollout_progress import RolloutProgress
from .task_files import Existing, ResultFile, Task, check_tasks, finished_ids, pending_tasks
from .workflow_loading import Workflow, load_workflow

if TYPE_CHECKING:
    from lragent.runtime import Engine


def rollout(
    artifact: ArtifactArgument,
    workflow: Annotated[str, typer.Option(metavar="FILE.py:FUNC", help="async def FUNC(task, t) -> dict.")],
    tasks: Annotated[Path, typer.Option(metavar="TASKS.jsonl", help="One JSON object a line.")],
    out: Annotated[Path, typer.Option(metavar="RESULTS.jsonl", help="One line is added for each finished task.")],
    sharing: Sharing = "base_lr_shared",
    concurrency: Concurrency = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the results in --out, run the other tasks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop what is in --out.")] = False,
    kv_memory: KvMemory = KV_MEMORY,
    max_batch_tokens: MaxBatchTokens = 2048,
    backend: Backend = "auto",
    attention: Attention = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    agents: Agents = None,
    as_json: AsJson = False,
) -> None:
    """Run a workflow over tasks; what fails in one task is that task's error line."""
    existing = _existing(out, tasks, resume, overwrite)
    ids = check_tasks(tasks)
    function = load_workflow(workflow)
    finished = finished_ids(out, existing)
    left = len(set(ids) - finished)
    if left == 0:
        summary = {"out": str(out), "sharing": sharing, "tasks": len(ids), "kept": len(ids), "done": 0, "failed": 0}
    else:
        acting = None if agents is None else tuple(name.strip() for name in agents.split(","))
        options = EngineOptions(
            kv_memory, max_batch_tokens, backend, attention, device, threads, allow_compiled, acting
        )
        engine = options.load(artifact, sharing)
        with ResultFile(out, existing) as file:
            left = len(set(ids) - file.finished)  # another run may have gone on with the file meanwhile
            try:
                with RolloutProgress(engine, left, "rollout") as bar:
                    run_into(file, bar, engine, function, pending_tasks(tasks, file.finished), concurrency)
            except KeyboardInterrupt:
                typer.echo(f"interrupted: {out} has what was finished; go on with --resume", err=True)
                raise
        summary = {"out": str(out), "sharing": sharing, "tasks": len(ids), "kept": len(ids) - left}
        summary |= _measured(bar, engine)
    if as_json:
        print_json(summary)
    else:
        results.print(_in_words(summary), markup=False, soft_wrap=True)


def run_into(
    file: ResultFile, bar: RolloutProgress, engine: Engine, workflow: Workflow, tasks: Iterable[Task], concurrency: int
) -> None:
    """Runs tasks and writes each one's line when it is finished."""
    for outcome in engine.run(workflow, tasks, concurrency=concurrency):
        line = result_line(outcome)
        file.write(line)
        bar.count(outcome, failed=line["error"] is not None)


def _existing(out: Path, tasks: Path, resume: bool, overwrite: bool) -> Existing:
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if out.resolve() == tasks.resolve():
        raise typer.BadParameter(f"--out and --tasks are both {out}")
    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no directory {out.parent}")
    return "resume" if resume else "overwrite" if overwrite else "refuse"


def _measured(bar: RolloutProgress, engine: Engine) -> dict[str, Any]:
    stats = engine.stats()
    return {
        "done": bar.done,
        "failed": bar.failed,
        "generated_tokens": bar.tokens,
        "seconds": bar.seconds,
        "tokens_per_second": bar.tokens / bar.seconds,
        "computed": dataclasses.asdict(stats.tokens),
        "peak_cache_bytes": stats.peak_held_bytes,
        "preemptions": stats.preemptions,
    }


def _in_words(summary: dict[str, Any]) -> str:
    kept = f" ({summary['kept']} were there already)" if summary["kept"] else ""
    if not summary["done"]:
        return f"nothing to do: {summary['out']} has all {summary['tasks']} tasks"
    return (
        f"{summary['done']} tasks done{kept}, {summary['failed']} failed, in {show_seconds(summary['seconds'])}: "
        f"{show_count(summary['generated_tokens'])} tokens, {summary['tokens_per_second']:.1f} a second, "
        f"cache at most {show_bytes(summary['peak_cache_bytes'])}; results in {summary['out']}"
    )
