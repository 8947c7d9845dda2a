"""Task files and result files: one JSON object a line.

All tasks are checked before the first one runs. They are read again, one at a time, while the run goes on. Every result
is one write of one line. A killed run therefore leaves whole lines and at most one torn line, which has no newline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from lragent.errors import TaskFileError
from lragent.files.locks import try_lock

Task = dict[str, Any]
TaskId = str | int
Existing = Literal["refuse", "resume", "overwrite"]

SHOWN = 60


def read_tasks(path: Path) -> Iterator[Task]:
    """Yields the tasks of a file. A task without an "id" gets its line number as its id.

    Raises:
        TaskFileError: the file can't be read; a line is no JSON object, or its id is no string or whole number.
    """
    return (task for _, task in _numbered_tasks(path))


def check_tasks(path: Path) -> list[TaskId]:
    """Ids of all tasks, after reading the file to its end.

    Raises:
        TaskFileError: as `read_tasks`; two tasks have one id; the file has no task, or is a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TaskFileError(f"{path} is no regular file", "Tasks are read twice. Write them to a file.")
    line_of: dict[TaskId, int] = {}
    for number, task in _numbered_tasks(path):
        if task["id"] in line_of:
            raise TaskFileError(
                f"{path} lines {line_of[task['id']]} and {number} have the same id {json.dumps(task['id'])}",
                "Give every task its own id, so that results can be matched to tasks.",
            )
        line_of[task["id"]] = number
    if not line_of:
        raise TaskFileError(f"{path} has no task", "Write one JSON object a line.")
    return list(line_of)


def pending_tasks(path: Path, finished: Set[TaskId]) -> Iterator[Task]:
    """Yields the tasks that have no result yet."""
    return (task for task in read_tasks(path) if task["id"] not in finished)


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a result file; a torn last line (no newline) is left out."""
    for number, line in _lines(path):
        if line.endswith(b"\n"):
            yield _parse_object(path, number, line)


def finished_ids(path: Path, existing: Existing) -> set[TaskId]:
    """Ids of the results that a run keeps: those of a file that it resumes, none otherwise.

    Raises:
        TaskFileError: the file exists and `existing` is "refuse", or a whole line of it can't be read.
    """
    if existing == "overwrite" or not path.exists():
        return set()
    if existing == "refuse":
        raise TaskFileError(f"{path} exists", "Go on with it (--resume), or replace it (--overwrite).")
    return _ids(path)


def _ids(path: Path) -> set[TaskId]:
    """Ids in a result file. Lines without a valid id are the user's own; they are kept and ignored."""
    found = (result.get("id") for result in read_results(path))
    return {each for each in found if isinstance(each, str | int)}


class ResultFile:
    """Appends results to a file. Every line is written before `write` returns.

    The file is locked until it is closed: two runs can't write it at once.

    Args:
        existing: applies if the file exists: "refuse" raises, "resume" drops a torn last line and keeps the others,
            "overwrite" empties it.

    Attributes:
        finished: ids of the results that the file had when it was opened and that stay.

    Raises:
        TaskFileError: the file can't be written, or another run writes it.
    """

    def __init__(self, path: Path, existing: Existing = "refuse") -> None:
        self._path = path
        self.finished: set[TaskId] = set()
        try:
            # The file is not emptied when it is opened: another run may hold its lock.
            self._file = path.open("xb" if existing == "refuse" else "ab", buffering=0)
        except OSError as error:
            raise TaskFileError(f"{path} can't be written: {error.strerror}", "Choose another file (--out).") from error
        if not path.is_file():  # a pipe, a terminal
            return
        if not try_lock(self._file.fileno()):
            self._file.close()
            raise TaskFileError(f"another run is writing {path}", "Wait for it, or choose another file (--out).")
        if existing == "overwrite":
            self._file.truncate(0)
        elif existing == "resume":
            _drop_torn_line(path)
            self.finished = _ids(path)

    def write(self, result: dict[str, Any]) -> None:
        """Appends one line.

        Raises:
            TaskFileError: the line can't be written, for example because the disk is full; earlier lines stay.
        """
        line = (json.dumps(result, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
        left = memoryview(line)
        try:
            while left:  # a disk that is nearly full takes a part of the line
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            raise TaskFileError(
                f"{self._path} can't be written: {error.strerror}",
                "Its whole lines stay. Make room, then go on with it (--resume).",
            ) from error

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _numbered_tasks(path: Path) -> Iterator[tuple[int, Task]]:
    for number, line in _lines(path):
        task = _parse_object(path, number, line)
        task.setdefault("id", number)
        if not isinstance(task["id"], str | int) or isinstance(task["id"], bool):
            raise TaskFileError(
                f'{path} line {number}: "id" is {_shorten(json.dumps(task["id"]))}, not a string or a whole number',
                "Give every task its own id, or give none an id.",
            )
        yield number, task


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields line numbers and lines; blank lines are left out."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TaskFileError(f"{path} can't be read: {error.strerror}", "Check the path.") from error


def _parse_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    hint = "Write one JSON object a line."
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskFileError(
            f"{path} line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
            "Save the file as UTF-8.",
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number that is too long; objects that are nested too deeply
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise TaskFileError(f"{path} line {number}: not JSON ({what}): {_shorten(text)}", hint) from error
    if not isinstance(value, dict):
        raise TaskFileError(f"{path} line {number}: not a JSON object but {_shorten(text)}", hint)
    return value


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _drop_torn_line(path: Path) -> None:
    """Cuts a file after its last newline."""
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        block = 1 << 16
        at = end
        while at > 0:
            start = max(0, at - block)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            at = start
        file.truncate(0)
