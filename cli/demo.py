"""`lragent demo`: the agents of examples/fact_world answer held-out questions under every sharing scheme."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lragent.errors import TaskFileError
from lragent.program.defaults import KV_MEMORY

from .demo_artifact import ensure_artifact, ensure_model
from .engine_options import (
    ALL_SCHEMES,
    AsJson,
    Backend,
    Concurrency,
    EngineOptions,
    KvMemory,
    Schemes,
    Threads,
    parse_schemes,
)
from .output import print_json, results
from .result_lines import result_line
from .scheme_runs import SchemeRun, comparison_table, run_scheme
from .task_files import ResultFile
from .workflow_loading import Workflow, load_workflow

FACT_WORLD = Path(__file__).resolve().parent.parent / "examples" / "fact_world"


def demo(
    tasks: Annotated[int, typer.Option(min=1, help="Held-out questions for each scheme.")] = 12,
    schemes: Schemes = ALL_SCHEMES,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Where model, artifact and results are kept.")] = Path(
        ".demo"
    ),
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="SmolLM2-135M-Instruct, if it is there already.")
    ] = None,
    world: Annotated[Path, typer.Option(metavar="DIR", help="The fact_world example.")] = FACT_WORLD,
    concurrency: Concurrency = 8,
    kv_memory: KvMemory = KV_MEMORY,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer multi-hop questions with three real agents, once for each sharing scheme."""
    chosen = parse_schemes(schemes)
    workflow, questions = load_world(world, tasks)
    work.mkdir(parents=True, exist_ok=True)
    model = model or ensure_model(work / "model")
    artifact = ensure_artifact(model, world / "adapters", work / "fact_world.lragent", compiled=backend != "eager")
    options = EngineOptions(kv_memory, backend=backend, threads=threads)
    runs: list[SchemeRun] = []
    for sharing in chosen:
        with ResultFile(work / f"results-{sharing}.jsonl", "overwrite") as file:
            engine = options.load(artifact, sharing)
            runs.append(
                run_scheme(engine, workflow, questions, concurrency, lambda outcome: file.write(result_line(outcome)))
            )
            del engine
    if as_json:
        print_json({"tasks": tasks, "runs": [run.to_dict() for run in runs]})
        return
    results.print(comparison_table(runs, f"fact_world: {tasks} held-out questions, plan, action and reflect agents"))
    results.print(f"trajectories are in {work}/results-*.jsonl", markup=False)


def load_world(world: Path, tasks: int) -> tuple[Workflow, list[dict[str, Any]]]:
    """The workflow of the example, and its first held-out tasks.

    Raises:
        TaskFileError: the example isn't there.
    """
    if not (world / "workflow.py").is_file():
        raise TaskFileError(f"no fact_world example in {world}", "Run it in a checkout, or give --world DIR.")
    workflow = load_workflow(f"{world / 'workflow.py'}:workflow")
    package = workflow.__module__.rpartition(".")[0]
    questions: list[dict[str, Any]] = importlib.import_module(f"{package}.world").make_tasks("test", tasks)
    return workflow, questions
