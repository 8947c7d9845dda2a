"""`lragent rollout`: runs a workflow over a file of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lragent.files.user_path import user_path
from lragent.program.defaults import ATTENTION, BACKEND, DEVICE, KV_MEMORY, MAX_BATCH_TOKENS, MAX_KL, SHARING

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
    MaxKl,
    Sharing,
    Threads,
)
from .output import print_json, results
from .quantities import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from lragent.rollouts.kept_results import Existing
    from lragent.rollouts.run import RolloutSummary

TASKS_FAILED = 3  # exit code
EXISTING: Mapping[str, Existing] = {"--resume": "resume", "--retry-failed": "retry", "--overwrite": "overwrite"}


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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep results in --out and run the other tasks. Refused if the workflow, artifact, scheme, seed "
            "or a finished task has changed.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="As --resume, and run tasks again whose result is an error; the workflow may have changed.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the run: the same command draws the same samples.")] = 0,
    kv_memory: KvMemory = KV_MEMORY,
    max_batch_tokens: MaxBatchTokens = MAX_BATCH_TOKENS,
    backend: Backend = BACKEND,
    attention: Attention = ATTENTION,
    device: Device = DEVICE,
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    agents: Agents = None,
    max_kl: MaxKl = MAX_KL,
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore/--no-rescore",
            help="Where nothing is known of the adapters under the scheme, rescore a sample of the trajectories under "
            "non_shared beside the run, and report the drift.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run a workflow over tasks. An exception in one task becomes the error in that task's line.

    Beside RESULTS.jsonl, RESULTS.jsonl.run.json tells the run that wrote it.

    Exit codes: 0; 1 the run is not possible; 2 usage; 3 a task's result is an error; 130 interrupted.
    """
    from lragent.artifact.directory import open_artifact
    from lragent.artifact.sharing_choice import choice_of_artifact
    from lragent.rollouts.run import nothing_left, plan_rollout, run_rollout
    from lragent.rollouts.run_facts import run_of_artifact
    from lragent.rollouts.workflow_loading import open_workflow

    from .rollout_progress import RolloutProgress

    existing = _existing(out, tasks, {"--resume": resume, "--retry-failed": retry_failed, "--overwrite": overwrite})
    acting = None if agents is None else tuple(name.strip() for name in agents.split(","))
    opened = open_artifact(artifact)
    scheme = choice_of_artifact(opened, sharing, acting, max_kl).scheme
    run = run_of_artifact(opened.manifest, workflow, scheme, seed)
    plan = plan_rollout(tasks, out, existing, run)
    options = EngineOptions(
        kv_memory, max_batch_tokens, backend, attention, device, threads, allow_compiled, acting, max_kl
    )
    with open_workflow(workflow):  # before the engine is loaded: the file may be broken
        if not plan.left:
            summary = nothing_left(out, run, scheme, plan)
        else:
            engine = options.load(artifact, sharing)
            try:
                with RolloutProgress(engine, plan.left, "rollout") as bar:
                    summary = run_rollout(
                        engine, workflow, tasks, out, existing, concurrency, bar.count, seed, rescore, bar.show_drift
                    )
            except KeyboardInterrupt:
                typer.echo(f"interrupted: {out} has the finished tasks; go on with --resume", err=True)
                raise
    if as_json:
        print_json(summary.to_dict())
    else:
        results.print(_in_words(summary), markup=False, soft_wrap=True)
        if summary.rescored is not None and summary.rescored.in_words():
            seconds = show_seconds(summary.rescored.seconds)
            results.print(f"{summary.rescored.in_words()}; rescoring took {seconds}", markup=False, soft_wrap=True)
    if summary.all_failed:
        raise typer.Exit(TASKS_FAILED)


def _existing(out: Path, tasks: Path, options: Mapping[str, bool]) -> Existing:
    """The treatment of an existing result file.

    Raises:
        typer.BadParameter: options or paths that exclude each other.
    """
    given = [name for name, on in options.items() if on]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other")
    if out.resolve() == tasks.resolve():
        raise typer.BadParameter(f"--out and --tasks are both {out}")
    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no directory {out.parent}")
    return EXISTING[given[0]] if given else "refuse"


def _in_words(summary: RolloutSummary) -> str:
    kept = f" ({summary.kept} had results already)" if summary.kept else ""
    failed = f"; {summary.all_failed} tasks have errors, --retry-failed runs them again" if summary.all_failed else ""
    older = f"; {summary.older} lines are of an older workflow" if summary.older else ""
    if not summary.done:
        return f"nothing to do: {summary.out} has all {summary.tasks} tasks{failed}{older}"
    return (
        f"{summary.done} tasks done{kept} under {summary.sharing}, {summary.failed} failed, in "
        f"{show_seconds(summary.seconds)}: "
        f"{show_count(summary.generated_tokens)} tokens, {summary.tokens_per_second:.1f} a second, "
        f"cache at most {show_bytes(summary.peak_cache_bytes)}; results in {summary.out}{failed}{older}"
    )
