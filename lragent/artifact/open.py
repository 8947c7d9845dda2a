"""Artifact -> `Program`: picks the program of a layout, its weights and its compiled files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lragent.artifact.adapter_map_file import read_map
from lragent.artifact.compiled_files import CompiledKey, compiled_file, keep_compiled
from lragent.artifact.directory import Artifact
from lragent.artifact.manifest import LayoutEntry, identity
from lragent.artifact.package_probe import Probe, require_runs
from lragent.compile.compile import ProgramFacts, compile_graph, eager_call, join, load_compiled, program, target_name
from lragent.compile.devices import moved, placed
from lragent.compile.live_adapters.slots import ConstantSlots
from lragent.errors import Miss, RequestError
from lragent.graph.graph_file import read_graph
from lragent.kernels.dispatch import graphs
from lragent.program.dtypes import dtype_name, dtype_named
from lragent.program.program import Program

if TYPE_CHECKING:
    from lragent.passes.pipeline import Lowered

log = logging.getLogger(__name__)

BACKENDS = ("auto", "compiled", "eager")
# Kinds of devices on which a package runs in a child process first: PyTorch may crash when it loads one there.
PROBED = ("cuda",)


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "compiled" or "eager"; "auto" is "compiled" on a CPU, and "eager" elsewhere until packages are proven there.

    Raises:
        RequestError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise RequestError(f"unknown backend {backend!r}", f"Use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
    if backend == "auto":
        return "compiled" if device.type == "cpu" else "eager"
    return backend


def program_of_artifact(
    artifact: Artifact,
    entry: LayoutEntry,
    backend: str,
    attention: str,
    device: torch.device,
    kv_dtype: torch.dtype,
    allow_compiled: bool,
) -> Program:
    """The runnable program of one layout of an artifact.

    Args:
        backend: "compiled" or "eager" (see `resolve_backend`).
        allow_compiled: False compiles again instead of loading compiled files of the artifact, and keeps nothing.

    Raises:
        ArtifactError: a file is missing or damaged, or a package crashes on a device of a kind in `PROBED`.
        CompilerMissing: a package is missing and can't be compiled.
    """
    manifest = artifact.manifest
    weights = moved(artifact.weights(), device)
    calls: dict[str, Callable[..., Tensor]] = {}
    fallback: dict[str, Miss] = {}  # by layer
    for name in graphs(attention):
        wanted = _Wanted(artifact, entry, weights, attention, CompiledKey(entry.schema.layout, name, kv_dtype), device)
        if backend == "eager":
            lowered = _lower(wanted)
            calls[name], misses = eager_call(lowered.graph), lowered.fallback
        else:
            calls[name], misses = _compiled(wanted, allow_compiled)
        fallback.update({miss.where: miss for miss in misses})
    facts = ProgramFacts(
        schema=entry.schema,
        agents=manifest.agents,
        max_positions=manifest.max_positions,
        vocab_size=manifest.vocab_size,
        dtype=dtype_named(manifest.dtype),
        attention=attention,
        fallback=tuple(fallback.values()),
    )
    adapter_map = read_map(artifact.file(entry.adapter_map))
    return replace(
        program(join(calls), facts, backend, device),
        identity=partial(identity, manifest),
        adapters=ConstantSlots(manifest.agents, adapter_map, weights, facts.dtype),
    )


@dataclass(frozen=True)
class _Wanted:
    """One graph of an artifact that is to run on a device.

    Args:
        weights: all weights by name, on `device`.
        attention: the implementation to which the graph `key.graph` belongs.
    """

    artifact: Artifact
    entry: LayoutEntry
    weights: Mapping[str, Tensor]
    attention: str
    key: CompiledKey
    device: torch.device


def _compiled(wanted: _Wanted, allow_compiled: bool) -> tuple[Callable[..., Tensor], tuple[Miss, ...]]:
    """The compiled graph, and its layers that run another attention implementation.

    The compiled file is the artifact's. If it has none for this machine, or `allow_compiled` is False, the graph is
    lowered and compiled now.
    """
    held = _held(wanted) if allow_compiled else None
    if held is not None:
        return _load(wanted, held), wanted.entry.fallbacks.get(wanted.key.graph, ())
    lowered = _lower(wanted)
    with tempfile.TemporaryDirectory(prefix="lragent-") as scratch:
        built = _compile(wanted, lowered, Path(scratch))
        call = _load(wanted, built)
        if allow_compiled:
            _keep(wanted, built)
        return call, lowered.fallback


def _held(wanted: _Wanted) -> Path | None:
    """The artifact's compiled file for this machine, checked; None if it has none."""
    entry = wanted.artifact.manifest.compiled.get(target_name(wanted.device), {}).get(str(wanted.key))
    return None if entry is None else compiled_file(wanted.artifact, entry)


def _lower(wanted: _Wanted) -> Lowered:
    """Lowers the artifact's program for the graph, with its weights on the device."""
    from lragent.passes.pipeline import lower

    source = read_graph(wanted.artifact.file(wanted.entry.program), wanted.weights)
    lowered = lower(source, wanted.key.graph)
    return replace(lowered, graph=placed(lowered.graph, wanted.device))


def _compile(wanted: _Wanted, lowered: Lowered, directory: Path) -> Path:
    """Compiles a lowered graph into `directory`; returns the file to load."""
    key, unit = wanted.key, wanted.artifact.manifest.unit
    target = target_name(wanted.device)
    log.warning("compiling %s for %s; this takes a minute or more for a real model", key, target)
    schema = wanted.entry.schema
    return compile_graph(lowered.graph, schema, key.kv_dtype, key.graph, unit, directory, wanted.device).file


def _load(wanted: _Wanted, file: Path) -> Callable[..., Tensor]:
    """Loads a compiled file, after a run in a child process on devices of the kinds in `PROBED`."""
    if wanted.device.type in PROBED:
        key, where = wanted.key, str(wanted.artifact.directory)
        dtype, device = dtype_name(key.kv_dtype), str(wanted.device)
        require_runs(Probe(where, key.layout, str(file), wanted.attention, key.graph, dtype, device))
    return load_compiled(file, wanted.entry.schema, wanted.weights, wanted.device)


def _keep(wanted: _Wanted, file: Path) -> None:
    """Adds a compiled file to the artifact; logs a warning if that is impossible."""
    try:
        keep_compiled(wanted.artifact, target_name(wanted.device), wanted.key, file)
    except OSError as error:
        where = wanted.artifact.directory
        log.warning("the package can't be kept in %s (%s): the next load compiles again", where, error)
