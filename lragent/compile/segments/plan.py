"""`plan.json` beside the packages of a graph that was compiled in segments: what is called with what.

A source is "input:NAME" (a step input or a cache tensor), "weight:NAME", or "value:NAME" (an earlier segment's).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path, PurePath

from lragent.errors import ArtifactError
from lragent.files.checked_file import FileEntry

PLAN = "plan.json"
INPUT, WEIGHT, VALUE = "input:", "weight:", "value:"
FORMAT = 1


@dataclass(frozen=True)
class Call:
    """One segment: its package by place, sources of its inputs, names of the values that it gives."""

    package: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Calls in order; `result` is the value that the whole graph gives. Paths are those beside the plan."""

    packages: tuple[FileEntry, ...]
    calls: tuple[Call, ...]
    result: str
    format: int = FORMAT


def is_plan(file: PurePath) -> bool:
    """True for the plan of a graph that was compiled in segments, False for a package."""
    return file.name == PLAN


def write_plan(plan: Plan, directory: Path) -> Path:
    path = directory / PLAN
    path.write_text(json.dumps(dataclasses.asdict(plan), indent=1), encoding="utf-8")
    return path


def read_plan(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        ArtifactError: it is no plan, or one of another format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, not {FORMAT}")
        return Plan(
            packages=tuple(FileEntry(**entry) for entry in raw["packages"]),
            calls=tuple(Call(c["package"], tuple(c["inputs"]), tuple(c["outputs"])) for c in raw["calls"]),
            result=raw["result"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}", "Convert again.") from error
