"""The facts of a run: the parts that decide its results are compared, the others are recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lragent.rollouts.jsonl import shorten
from lragent.rollouts.workflow_parts import workflow_parts

if TYPE_CHECKING:
    from lragent.artifact.manifest import Manifest
    from lragent.runtime import Engine, Workflow

WORKFLOW = "workflow"
DIGITS = 12  # of a run's digest
_HASH = 64  # hexadecimal digits of a sha256


@dataclass(frozen=True)
class Run:
    """Parts of a run by name; parts of parts are mappings. All values are JSON."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """First digits of the sha256 of all parts."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:DIGITS]


def run_of_engine(engine: Engine, workflow: Workflow | str, seed: int) -> Run:
    """The run of a workflow on an engine. Reads all weights of an engine that was made from a live model."""
    from lragent.program.dtypes import dtype_name

    program = engine.program
    dtype = program.facts.get("dtype", "")
    return _run(workflow, program.identity(), engine.sharing, dtype, dtype_name(engine.kv_dtype), seed)


def run_of_artifact(manifest: Manifest, workflow: str, sharing: str, seed: int) -> Run:
    """The run of a workflow on an engine with a cache in the artifact's dtype, before the engine is opened."""
    from lragent.artifact.manifest import identity

    return _run(workflow, identity(manifest), sharing, manifest.dtype, manifest.dtype, seed)


def _run(
    workflow: Workflow | str, artifact: Mapping[str, Any], sharing: str, dtype: str, kv_dtype: str, seed: int
) -> Run:
    parts = {
        WORKFLOW: workflow_parts(workflow),
        "artifact": artifact,
        "sharing": sharing,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "seed": seed,
    }
    return Run(json.loads(json.dumps(parts)))  # as it will be read again


def start_of(engine: Engine, concurrency: int) -> dict[str, Any]:
    """Facts of one start of a run that don't decide its results."""
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{name: engine.program.facts.get(name, "") for name in ("backend", "attention", "device")},
        "threads": torch.get_num_threads(),
        "concurrency": concurrency,
        "samples": 1,
        "agents": list(engine.agents),
        "versions": {name: version(name) for name in ("lragent", "torch")},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Parts in which two runs differ: name -> sentence with both values."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return {
        name: f"{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}"
        for name in (*old, *(name for name in new if name not in old))
        if old.get(name) != new.get(name)
    }


def _leaves(parts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in parts.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, str):
        return value[:DIGITS] if len(value) == _HASH else value
    return shorten(json.dumps(value))
