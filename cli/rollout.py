"""`lragent rollout`: runs a workflow over a file of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lragent.files.user_path import user_path
from lragent.program.defaults import ATTENTION, BACKEND, DEVICE, KV_MEMORY, MAX_BATCH_TOKENS, SHARING

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

if TYPE_CHECKING:
    from lragent.rollouts.jsonl import Existing
    from lragent.rollouts.run import RolloutSummary


def rollout(
    artifact: ArtifactArgument,
    workflow: Annotated[str, typer.Option(metavar="FILE.py:FUNC", help="async def FUNC(task, t) -> dict.")],
    tasks: Annotated[Path, typer.Option(metavar="TASKS.jsonl", parser=user_path, help="One JSON object a line.")],
    out: Annotated[
        Path,
        typer.Option(metavar="RESULTS.jsonl", parser=user_path, help="One line is added for each finished task."),
    ],
    sharing: Sharing = SHARING,
    concurrency: Concurrency = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Keep results in --out and run the other tasks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    kv_memory: KvMemory = KV_MEMORY,
    max_batch_tokens: MaxBatchTokens = MAX_BATCH_TOKENS,
    backend: Backend = BACKEND,
    attention: Attention = ATTENTION,
    device: Device = DEVICE,
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    agents: Agents = None,
    as_json: AsJson = False,
) -> None:
    """Run a workflow over tasks. An exception in one task becomes the error in that task's line."""
    from lragent.rollouts.run import RolloutSummary, plan_rollout, run_rollout
    from lragent.rollouts.workflow_loading import open_workflow

    from .rollout_progress import RolloutProgress

    existing = _existing(out, tasks, resume, overwrite)
    plan = plan_rollout(tasks, out, existing)
    acting = None if agents is None else tuple(name.strip() for name in agents.split(","))
    options = EngineOptions(kv_memory, max_batch_tokens, backend, attention, device, threads, allow_compiled, acting)
    with open_workflow(workflow) as function:
        if not plan.left:
            summary = RolloutSummary(out, sharing, plan.tasks, plan.kept)
        else:
            engine = options.load(artifact, sharing)
            try:
                with RolloutProgress(engine, plan.left, "rollout") as bar:
                    summary = run_rollout(engine, function, tasks, out, existing, concurrency, bar.count)
            except KeyboardInterrupt:
                typer.echo(f"interrupted: {out} has the finished tasks; go on with --resume", err=True)
                raise
    if as_json:
        print_json(summary.to_dict())
    else:
        results.print(_in_words(summary), markup=False, soft_wrap=True)


def _existing(out: Path, tasks: Path, resume: bool, overwrite: bool) -> Existing:
    """The treatment of an existing result file.

    Raises:
        typer.BadParameter: options or paths that exclude each other.
    """
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if out.resolve() == tasks.resolve():
        raise typer.BadParameter(f"--out and --tasks are both {out}")
    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no directory {out.parent}")
    return "resume" if resume else "overwrite" if overwrite else "refuse"


def _in_words(summary: RolloutSummary) -> str:
    kept = f" ({summary.kept} had results already)" if summary.kept else ""
    if not summary.done:
        return f"nothing to do: {summary.out} has all {summary.tasks} tasks"
    return (
        f"{summary.done} tasks done{kept}, {summary.failed} failed, in {show_seconds(summary.seconds)}: "
        f"{show_count(summary.generated_tokens)} tokens, {summary.tokens_per_second:.1f} a second, "
        f"cache at most {show_bytes(summary.peak_cache_bytes)}; results in {summary.out}"
    )
