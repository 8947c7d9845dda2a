"""`RESULTS.jsonl.run.json`: the runs that wrote a result file, the newest last."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lragent.errors import TaskFileError
from lragent.files.replace_file import replacing
from lragent.rollouts.result_lines import FORMAT
from lragent.rollouts.run_facts import Run
from lragent.rollouts.tasks import TaskId

SUFFIX = ".run.json"
Key = tuple[TaskId, int]  # of a line: task and sample


@dataclass(frozen=True)
class RunEntry:
    """A run and its starts (`lragent.rollouts.run_facts.start_of`): the first one, and each one that resumed it."""

    run: Run
    starts: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class RunFile:
    """Contents of the file.

    Args:
        attempts: for each (task, sample) whose failed line was removed, the attempt of that line.
    """

    entries: tuple[RunEntry, ...] = ()
    attempts: Mapping[Key, int] = field(default_factory=dict)

    def started(self, run: Run, start: Mapping[str, Any]) -> RunFile:
        """The file after another start: of its newest run if that is `run`, else of a new run."""
        last = self.entries[-1] if self.entries else None
        if last is not None and last.run.digest == run.digest:
            entry = dataclasses.replace(last, starts=(*last.starts, start))
            return dataclasses.replace(self, entries=(*self.entries[:-1], entry))
        return dataclasses.replace(self, entries=(*self.entries, RunEntry(run, (start,))))

    def with_facts(self, facts: Mapping[str, Any]) -> RunFile:
        """The file with more facts of its newest start."""
        last = self.entries[-1]
        entry = dataclasses.replace(last, starts=(*last.starts[:-1], {**last.starts[-1], **facts}))
        return dataclasses.replace(self, entries=(*self.entries[:-1], entry))


def run_file_of(results: Path) -> Path:
    """The run file beside a result file."""
    return results.with_name(results.name + SUFFIX)


def read_run_file(path: Path) -> RunFile | None:
    """None if there is no file.

    Raises:
        TaskFileError: the file can't be read, is damaged, or is of another format.
    """
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT:
            raise TaskFileError(f"{path} has format {raw['format']!r}, this lragent reads {FORMAT}", _ANEW)
        entries = tuple(RunEntry(Run(entry["parts"]), tuple(entry["starts"])) for entry in raw["runs"])
        attempts = {(task, int(sample)): int(attempt) for task, sample, attempt in raw["attempts"]}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TaskFileError(f"{path} can't be read: {error.strerror}", "Check the path.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TaskFileError(f"{path} is damaged: {type(error).__name__}: {error}", _ANEW) from error
    if not entries:
        raise TaskFileError(f"{path} is damaged: it names no run", _ANEW)
    return RunFile(entries, attempts)


_ANEW = "Restore the file, or start anew: another file (--out), or --overwrite."


def write_run_file(path: Path, contents: RunFile) -> None:
    """Replaces the file in one step; it is on disk when this returns.

    Raises:
        OSError: it can't be written.
    """
    runs = [
        {"run": entry.run.digest, "parts": entry.run.parts, "starts": list(entry.starts)} for entry in contents.entries
    ]
    attempts = [[task, sample, attempt] for (task, sample), attempt in contents.attempts.items()]
    text = json.dumps({"format": FORMAT, "runs": runs, "attempts": attempts}, indent=1)
    with replacing(path) as file:
        file.write(text.encode())
