"""Artifact or live model -> `Engine`: picks the program of the sharing scheme, its weights and its compiled package."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lragent.artifact.compiled_files import compiled_file, keep_compiled
from lragent.artifact.directory import Artifact
from lragent.artifact.manifest import LayoutEntry
from lragent.artifact.package_probe import Probe, require_runs
from lragent.compile.compile import ProgramFacts, compile_graph, eager_call, join, load_compiled, program, target_name
from lragent.compile.devices import moved, placed
from lragent.compile.export import load_with_weights
from lragent.errors import Miss, RequestError
from lragent.kernels.dispatch import graphs
from lragent.program.dtypes import dtype_name, dtype_named
from lragent.program.program import AgentFacts, Program

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

    Raises:
        ArtifactError: a file is missing or damaged, or a package crashes on a device of a kind in `PROBED`.
        CompilerMissing: a package is missing and can't be compiled.
    """
    weights = moved(artifact.weights(), device)
    calls: dict[str, Callable[..., Tensor]] = {}
    fallback: dict[str, Miss] = {}  # by layer
    for name in graphs(attention):
        if backend == "eager":
            lowered = _lowered(artifact, entry, weights, name, device)
            calls[name], misses = eager_call(lowered.graph), lowered.fallback
        else:
            calls[name], misses = _compiled(artifact, entry, weights, attention, name, kv_dtype, allow_compiled, device)
        fallback.update({miss.where: miss for miss in misses})
    manifest = artifact.manifest
    facts = ProgramFacts(
        schema=entry.schema,
        agents=tuple(AgentFacts(agent.name, agent.digest) for agent in manifest.agents),
        max_positions=manifest.max_positions,
        vocab_size=manifest.vocab_size,
        dtype=dtype_named(manifest.dtype),
        attention=attention,
        fallback=tuple(fallback.values()),
    )
    return program(join(calls), facts, backend, device)


def _lowered(
    artifact: Artifact, entry: LayoutEntry, weights: Mapping[str, Tensor], graph_name: str, device: torch.device
) -> Lowered:
    """A program of the artifact, lowered now, on `device`."""
    from lragent.passes.pipeline import lower

    lowered = lower(load_with_weights(artifact.file(entry.program), weights), graph_name)
    return replace(lowered, graph=placed(lowered.graph, device))


def _compiled(
    artifact: Artifact,
    entry: LayoutEntry,
    weights: Mapping[str, Tensor],
    attention: str,
    graph_name: str,
    kv_dtype: torch.dtype,
    allow_compiled: bool,
    device: torch.device,
) -> tuple[Callable[..., Tensor], tuple[Miss, ...]]:
    """The compiled graph for a device of this machine, and its layers that run another attention implementation.

    The package is the artifact's, or one lowered now and kept there.
    """
    key, target = f"{entry.schema.layout}-{graph_name}-{dtype_name(kv_dtype)}", target_name(device)
    held = artifact.manifest.compiled.get(target, {}).get(key)

    def probe(package: Path) -> None:
        if device.type in PROBED:
            layout, dtype = entry.schema.layout, dtype_name(kv_dtype)
            where, used_on = str(artifact.directory), str(device)
            require_runs(Probe(where, layout, str(package), attention, graph_name, dtype, used_on))

    if held is not None and allow_compiled:
        package = compiled_file(artifact, held)
        probe(package)
        return load_compiled(package, entry.schema, weights, device), entry.fallbacks.get(graph_name, ())
    log.warning("compiling %s for %s; this takes a minute or more for a real model", key, target)
    lowered = _lowered(artifact, entry, weights, graph_name, device)
    with tempfile.TemporaryDirectory(prefix="lragent-") as scratch:
        unit = artifact.manifest.unit
        built = compile_graph(lowered.graph, entry.schema, kv_dtype, graph_name, unit, Path(scratch), device).file
        probe(built)
        if allow_compiled:
            try:
                keep_compiled(artifact, target, key, built)
            except OSError as error:
                where = artifact.directory
                log.warning("the package can't be kept in %s (%s): the next load compiles again", where, error)
        return load_compiled(built, entry.schema, weights, device), lowered.fallback
