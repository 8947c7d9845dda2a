"""`lragent demo`: the agents of examples/fact_world answer held-out questions under several sharing schemes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lragent.errors import TaskFileError
from lragent.files.user_path import user_path
from lragent.program.defaults import BACKEND, KV_MEMORY
from lragent.rollouts.result_file import open_results
from lragent.rollouts.result_lines import LinePlace, result_line, with_json_result
from lragent.rollouts.run_facts import run_of_engine, start_of
from lragent.rollouts.tasks import task_digest
from lragent.rollouts.workflow_loading import open_workflow

from .demo_artifact import AGENTS, ensure_artifact, ensure_model
from .engine_options import (
    SCHEMES,
    AsJson,
    Backend,
    Concurrency,
    EngineOptions,
    KvMemory,
    Threads,
    parse_schemes,
)
from .output import print_json, results
from .scheme_runs import SchemeRun, comparison_table, run_scheme

if TYPE_CHECKING:
    from lragent.rollouts.result_file import ResultFile
    from lragent.runtime import RolloutResult, Workflow

FACT_WORLD = Path(__file__).resolve().parent.parent / "examples" / "fact_world"
DEMO_SCHEMES, ALL = "non_shared,base_lr_shared", "all"
SHIPPED, TUNED = "as shipped", "tuned"


@dataclass(frozen=True)
class Column:
    """One run of the demo.

    Args:
        tuned: folder of the tuned adapters, one directory an agent; None as shipped.
    """

    sharing: str
    tuned: Path | None = None

    @property
    def adapters(self) -> str:
        """Name of the adapter set."""
        return SHIPPED if self.tuned is None else TUNED


def demo(
    tasks: Annotated[int, typer.Option(min=1, help="Held-out questions for each scheme.")] = 12,
    schemes: Annotated[
        str, typer.Option(metavar="A,B,...", help=f"Sharing schemes to compare, or {ALL}.")
    ] = DEMO_SCHEMES,
    work: Annotated[
        Path, typer.Option(metavar="DIR", parser=user_path, help="Folder for model, artifact and results.")
    ] = Path(".demo"),
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=user_path, help="SmolLM2-135M-Instruct, if you have it.")
    ] = None,
    world: Annotated[Path, typer.Option(metavar="DIR", parser=user_path, help="The fact_world example.")] = FACT_WORLD,
    concurrency: Concurrency = 8,
    kv_memory: KvMemory = KV_MEMORY,
    backend: Backend = BACKEND,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer multi-hop questions with three real agents under sharing schemes, adapters as shipped and tuned."""
    columns = columns_of(world, SCHEMES if schemes == ALL else parse_schemes(schemes))
    with open_world(world, tasks) as (workflow, questions):
        work.mkdir(parents=True, exist_ok=True)
        model = model or ensure_model(work / "model")
        artifact = ensure_artifact(model, world / "adapters", work / "fact_world.lragent", compiled=backend != "eager")
        options = EngineOptions(kv_memory, backend=backend, threads=threads)
        runs: list[SchemeRun] = []
        for column in columns:
            engine = options.load(artifact, column.sharing)
            if column.tuned is not None:
                engine.update_adapters({agent: column.tuned / agent for agent in AGENTS})
            name = f"{column.sharing}-{TUNED}" if column.tuned else column.sharing
            run, out = run_of_engine(engine, workflow, seed=0), work / f"results-{name}.jsonl"
            with open_results(out, "overwrite", run, start_of(engine, concurrency), tasks={}) as file:

                def keep(outcome: RolloutResult, file: ResultFile = file, digest: str = run.digest) -> None:
                    place = LinePlace(digest, outcome.index, task_digest(questions[outcome.index]))
                    file.write(result_line(with_json_result(outcome), place))

                runs.append(run_scheme(engine, workflow, questions, concurrency, keep, column.adapters))
            del engine
    if as_json:
        print_json({"tasks": tasks, "runs": [run.to_dict() for run in runs]})
        return
    results.print(comparison_table(runs, f"fact_world: {tasks} held-out questions, plan, action and reflect agents"))
    results.print(f"trajectories are in {work}/results-*.jsonl", markup=False)


def columns_of(world: Path, schemes: Sequence[str]) -> tuple[Column, ...]:
    """The runs of the demo: each scheme with the adapters as shipped, and with those that were tuned for it."""
    columns = []
    for sharing in schemes:
        columns.append(Column(sharing))
        tuned = world / "tuned" / sharing
        if tuned.is_dir():
            columns.append(Column(sharing, tuned))
    return tuple(columns)


@contextmanager
def open_world(world: Path, tasks: int) -> Iterator[tuple[Workflow, list[dict[str, Any]]]]:
    """Yields the workflow of the example, and its first held-out tasks.

    Raises:
        TaskFileError: the example doesn't exist.
    """
    if not (world / "workflow.py").is_file():
        raise TaskFileError(f"no fact_world example in {world}", "Run the demo in a checkout, or give --world DIR.")
    with open_workflow(f"{world / 'workflow.py'}:workflow") as workflow:
        package = workflow.__module__.rpartition(".")[0]
        questions: list[dict[str, Any]] = importlib.import_module(f"{package}.world").make_tasks("test", tasks)
        yield workflow, questions
