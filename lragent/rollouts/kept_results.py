"""Decides about an existing result file: may a run go on with it, which lines stay, which tasks are run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lragent.errors import TaskFileError
from lragent.rollouts.jsonl import numbered_lines, parse_object
from lragent.rollouts.result_lines import FORMAT
from lragent.rollouts.run_facts import WORKFLOW, Run, differences
from lragent.rollouts.run_file import Key, RunFile, read_run_file, run_file_of
from lragent.rollouts.tasks import TaskId, TaskPlace, is_task_id

Existing = Literal["refuse", "resume", "retry", "overwrite"]

MOST_NAMED = 5
NEEDED = {"sample", "attempt", "task_digest", "error"}  # entries of a line


@dataclass(frozen=True)
class Kept:
    """Result of `kept_results`.

    Args:
        run_file: contents of the run file, to which the new start is added.
        finished: (task, sample) of the lines that stay.
        failed: number of these lines that are errors of tasks in the task file.
        older: number of these lines that an older run has written.
        removed: line numbers that a retry removes.
    """

    run_file: RunFile = field(default_factory=RunFile)
    finished: frozenset[Key] = frozenset()
    failed: int = 0
    older: int = 0
    removed: frozenset[int] = frozenset()


def kept_results(path: Path, existing: Existing, run: Run, tasks: Mapping[TaskId, TaskPlace]) -> Kept:
    """Reads a result file and its run file; changes nothing.

    Args:
        existing: "refuse" and "overwrite" keep nothing; "resume" keeps every line, "retry" those without an error.
        run: the run to come. It may differ from the newest one in the file in nothing, under "retry" in its workflow.
        tasks: all tasks by id.

    Raises:
        TaskFileError: the file exists and `existing` is "refuse"; a file can't be read; the file is of another run, or
            has results of tasks that have changed since.
    """
    if existing == "overwrite" or not path.exists():
        return Kept()
    if existing == "refuse":
        raise TaskFileError(f"{path} exists", "Go on with it (--resume), or replace it (--overwrite).")
    run_file = read_run_file(run_file_of(path))
    if run_file is None:
        if next(numbered_lines(path), None) is None:
            return Kept()
        raise TaskFileError(
            f"{path} has no {run_file_of(path).name} beside it, which tells its run",
            "Restore that file, or start anew: another file (--out), or --overwrite.",
        )
    _require_same(path, run_file.entries[-1].run, run, retry=existing == "retry")
    known = {entry.run.digest for entry in run_file.entries}
    attempts = dict(run_file.attempts)
    finished: set[Key] = set()
    removed: set[int] = set()
    changed: list[TaskPlace] = []
    failed = older = 0
    for number, line in _results(path):
        if line.get("format") != FORMAT or line.get("run") not in known or not line.keys() >= NEEDED:
            raise TaskFileError(
                f"{path} line {number} is of a run that {run_file_of(path).name} does not name",
                "Remove the line, or start anew: another file (--out), or --overwrite.",
            )
        key, place = (line["id"], line["sample"]), tasks.get(line["id"])
        if place is not None and place.digest != line["task_digest"]:
            changed.append(place)
        if line["error"] is not None and existing == "retry" and place is not None:
            removed.add(number)
            attempts[key] = max(line["attempt"], attempts.get(key, 0))
            continue
        finished.add(key)
        failed += line["error"] is not None and place is not None
        older += line["run"] != run.digest
    if changed:
        raise _changed_tasks(path, changed)
    return Kept(RunFile(run_file.entries, attempts), frozenset(finished), failed, older, frozenset(removed))


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a result file; a torn last line (no newline) is left out."""
    return (result for _, result in _numbered_results(path))


def _numbered_results(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        if line.endswith(b"\n"):
            yield number, parse_object(path, number, line)


def _results(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and objects of result lines. Lines without a valid id are the user's own; they stay and are ignored."""
    return ((number, line) for number, line in _numbered_results(path) if is_task_id(line.get("id")))


def _require_same(path: Path, before: Run, now: Run, retry: bool) -> None:
    """Raises TaskFileError if the runs differ in more than a retry allows; names all parts and both values."""
    found = differences(before.parts, now.parts)
    of_workflow = [name for name in found if name.split(" ")[0] == WORKFLOW]
    refused = [name for name in found if not (retry and name in of_workflow)]
    if not refused:
        return
    hint = "Start anew: another file (--out), or --overwrite."
    if len(of_workflow) == len(found):
        hint = f"To run the failed and missing tasks with the new workflow, use --retry-failed. {hint}"
    raise TaskFileError(f"{path} is of another run: {'; '.join(found[name] for name in refused)}", hint)


def _changed_tasks(path: Path, changed: list[TaskPlace]) -> TaskFileError:
    names = [f"{json.dumps(place.id, ensure_ascii=False)} (line {place.line})" for place in changed[:MOST_NAMED]]
    more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    unnamed = "" if all(place.named for place in changed) else ' A task without an "id" is named by its line number.'
    return TaskFileError(
        f"{path} has results of tasks that have changed since: {', '.join(names)}{more}",
        f"Restore them, or give changed tasks ids of their own.{unnamed}",
    )
