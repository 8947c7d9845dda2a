"""Task files: one JSON object a line. All tasks are checked before the first one runs, and read again one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.errors import TaskFileError
from lragent.rollouts.jsonl import numbered_lines, parse_object, shorten

Task = dict[str, Any]
TaskId = str | int

DIGITS = 16  # of a task's digest


@dataclass(frozen=True)
class TaskPlace:
    """A task's place in its file.

    Args:
        id: its "id"; its line number if it has none.
        index: number of tasks before it; line: its line number, from 1.
        named: True if it has an "id".
        digest: first digits of the sha256 of its content, the order of its entries left out.
    """

    id: TaskId
    index: int
    line: int
    named: bool
    digest: str


def task_digest(task: Task) -> str:
    """See `TaskPlace`; `task` as the file has it."""
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:DIGITS]


def read_tasks(path: Path) -> Iterator[tuple[TaskPlace, Task]]:
    """Yields the tasks of a file. A task without an "id" gets its line number as its id.

    Raises:
        TaskFileError: the file can't be read; a line is no JSON object, or its id is no string or whole number.
    """
    for index, (number, line) in enumerate(numbered_lines(path)):
        task = parse_object(path, number, line)
        named, digest = "id" in task, task_digest(task)
        task.setdefault("id", number)
        if not is_task_id(task["id"]):
            raise TaskFileError(
                f'{path} line {number}: "id" is {shorten(json.dumps(task["id"]))}, not a string or a whole number',
                "Give every task its own id, or give none an id.",
            )
        yield TaskPlace(task["id"], index, number, named, digest), task


def check_tasks(path: Path) -> dict[TaskId, TaskPlace]:
    """Places of all tasks by id, after reading the file to its end.

    Raises:
        TaskFileError: as `read_tasks`; two tasks have one id; the file has no task, or is a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TaskFileError(f"{path} is no regular file", "Tasks are read twice. Write them to a file.")
    places: dict[TaskId, TaskPlace] = {}
    for place, _ in read_tasks(path):
        if place.id in places:
            raise TaskFileError(
                f"{path} lines {places[place.id].line} and {place.line} have the same id {json.dumps(place.id)}",
                "Give every task its own id, so that results can be matched to tasks.",
            )
        places[place.id] = place
    if not places:
        raise TaskFileError(f"{path} has no task", "Write one JSON object a line.")
    return places


def is_task_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
