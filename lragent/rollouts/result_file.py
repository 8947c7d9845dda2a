"""A result file that is open for writing.

Every result is one write of one line. A killed run therefore leaves whole lines and at most one torn line, which has no
newline. Beside the file lie its run file (`run_file.py`) and, while it is open, its lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lragent.errors import TaskFileError
from lragent.files.locks import file_lock
from lragent.files.replace_file import replacing
from lragent.rollouts.jsonl import line_of
from lragent.rollouts.kept_results import Existing, Kept, kept_results
from lragent.rollouts.run_facts import Run
from lragent.rollouts.run_file import RunFile, run_file_of, write_run_file
from lragent.rollouts.tasks import TaskId, TaskPlace

LOCK = ".lock"


class ResultFile:
    """Appends results to a file. Every line is written before `write` returns.

    Args:
        kept: the results that the file had when it was opened and that stay.
        run_file: contents of the run file, this start included; None for a pipe, which has none.
    """

    def __init__(self, path: Path, file: Any, kept: Kept, run_file: RunFile | None) -> None:
        self._path = path
        self._file = file
        self._run_file = run_file
        self.kept = kept

    def write(self, result: dict[str, Any]) -> None:
        """Appends one line.

        Raises:
            TaskFileError: the line can't be written, for example because the disk is full; earlier lines stay.
        """
        left = memoryview(line_of(result))
        try:
            while left:  # a disk that is nearly full takes a part of the line
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            raise TaskFileError(
                f"{self._path} can't be written: {error.strerror}",
                "Its whole lines stay. Make room, then go on with it (--resume).",
            ) from error

    def add_to_start(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to this start in the run file.

        Raises:
            TaskFileError: the run file can't be written.
        """
        if self._run_file is None:
            return
        self._run_file = self._run_file.with_facts(facts)
        path = run_file_of(self._path)
        try:
            write_run_file(path, self._run_file)
        except OSError as error:
            raise TaskFileError(f"{path} can't be written: {error.strerror}", "The results are complete.") from error


@contextmanager
def open_results(
    path: Path, existing: Existing, run: Run, start: Mapping[str, Any], tasks: Mapping[TaskId, TaskPlace]
) -> Iterator[ResultFile]:
    """Opens a result file for a run, and writes the run file first.

    The file is locked until the block ends: two runs can't write it at once.

    Args:
        existing: applies if the file exists: "refuse" raises, "resume" drops a torn last line and keeps the others,
            "retry" also removes the lines of tasks that failed, "overwrite" empties it.
        run, start: written into the run file (`lragent.rollouts.run_facts`).

    Raises:
        TaskFileError: see `kept_results`; the file can't be written, or another run writes it.
    """
    path = path.resolve()
    with ExitStack() as opened:
        try:
            if path.exists() and not path.is_file():  # a pipe, a terminal
                kept, contents = Kept(), None
            else:
                if not opened.enter_context(file_lock(path.with_name(path.name + LOCK))):
                    raise TaskFileError(
                        f"another run is writing {path}", "Wait for it, or choose another file (--out)."
                    )
                kept = kept_results(path, existing, run, tasks)
                contents = kept.run_file.started(run, start)
                _prepare(path, existing, kept, contents)
            file = opened.enter_context(path.open("ab", buffering=0))
        except OSError as error:
            raise TaskFileError(f"{path} can't be written: {error.strerror}", "Choose another file (--out).") from error
        yield ResultFile(path, file, kept, contents)


def _prepare(path: Path, existing: Existing, kept: Kept, contents: RunFile) -> None:
    """Brings both files into the state from which the run goes on. The caller holds the lock."""
    if existing == "overwrite" and path.exists():
        path.write_bytes(b"")
    write_run_file(run_file_of(path), contents)
    if kept.removed:
        _remove_lines(path, kept.removed)
    elif path.exists():
        _drop_torn_line(path)


def _remove_lines(path: Path, removed: frozenset[int]) -> None:
    """Rewrites a file without some of its lines and without a torn last line, in one step.

    Raises:
        OSError: the file can't be written.
    """
    with path.open("rb") as old, replacing(path) as new:
        for number, line in enumerate(old, start=1):
            if number not in removed and line.endswith(b"\n"):
                new.write(line)


def _drop_torn_line(path: Path) -> None:
    """Cuts a file after its last newline."""
    with path.open("r+b") as file:
        end = _end_of_lines(file)
        if end < file.seek(0, 2):
            file.truncate(end)


def _end_of_lines(file: BinaryIO) -> int:
    """Position after the last newline."""
    block = 1 << 16
    at = file.seek(0, 2)
    while at > 0:
        start = max(0, at - block)
        file.seek(start)
        newline = file.read(at - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        at = start
    return 0
