"""Result files for tests: runs, lines and the places of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lragent.rollouts.kept_results import Existing
from lragent.rollouts.result_file import ResultFile, open_results
from lragent.rollouts.run_facts import Run
from lragent.rollouts.tasks import TaskId, TaskPlace, task_digest

RUN = Run(
    {"workflow": {"function": "flow.py:go", "flow.py": "a" * 64}, "artifact": {"agents": {"plan": "p1"}}, "seed": 0}
)


def run_with(**parts: Any) -> Run:
    """`RUN` with other parts."""
    return Run({**RUN.parts, **parts})


def places(*tasks: Mapping[str, Any]) -> dict[TaskId, TaskPlace]:
    """Places of tasks in the order of their file."""
    found: dict[TaskId, TaskPlace] = {}
    for index, task in enumerate(tasks):
        name = task.get("id", index + 1)
        found[name] = TaskPlace(name, index, index + 1, "id" in task, task_digest(dict(task)))
    return found


def line(task: Mapping[str, Any], run: Run = RUN, error: str | None = None, **changes: Any) -> dict[str, Any]:
    """The entries of a result line that decide about it."""
    fields = {"format": 2, "id": task["id"], "sample": 0, "attempt": 1, "run": run.digest}
    return {**fields, "task_digest": task_digest(dict(task)), "error": error and {"type": error}, **changes}


def opened(
    path: Path, existing: Existing = "refuse", run: Run = RUN, tasks: Mapping[TaskId, TaskPlace] | None = None
) -> AbstractContextManager[ResultFile]:
    return open_results(path, existing, run, {"concurrency": 1}, tasks or {})


def written(path: Path, *lines: Mapping[str, Any]) -> Path:
    """A result file with lines of `RUN`, and its run file."""
    with opened(path) as file:
        for each in lines:
            file.write(dict(each))
    return path


def run_file(path: Path) -> Any:
    """Contents of the run file of a result file."""
    return json.loads(path.with_name(path.name + ".run.json").read_text())
