"""`plan.json`, stored beside the packages of a graph compiled in segments: the calls and their arguments.

A source is "input:NAME" (a step input or a cache tensor), "weight:NAME", or "value:NAME" (output of an earlier call).
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
    """The call of one segment.

    Args:
        package: index of its package in `SegmentPlan.packages`.
        inputs: source of each input.
        outputs: names of the values that it returns, with the prefix "value:".
    """

    package: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class SegmentPlan:
    """Calls in execution order.

    Args:
        packages: compiled packages; paths are relative to the plan's directory.
        result: source of the value that the whole graph returns.
    """

    packages: tuple[FileEntry, ...]
    calls: tuple[Call, ...]
    result: str
    format: int = FORMAT


def is_plan(file: PurePath) -> bool:
    """True for the plan of a graph that was compiled in segments, False for a package."""
    return file.name == PLAN


def write_plan(plan: SegmentPlan, directory: Path) -> Path:
    """Writes `plan.json` into `directory` and returns its path."""
    path = directory / PLAN
    path.write_text(json.dumps(dataclasses.asdict(plan), indent=1), encoding="utf-8")
    return path


def read_plan(path: Path) -> SegmentPlan:
    """Reads a plan.

    Raises:
        ArtifactError: the file is not a plan, or has another format version.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, expected {FORMAT}")
        return SegmentPlan(
            packages=tuple(FileEntry(**entry) for entry in raw["packages"]),
            calls=tuple(Call(c["package"], tuple(c["inputs"]), tuple(c["outputs"])) for c in raw["calls"]),
            result=raw["result"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}", "Convert again.") from error
