"""`LoadedModel -> artifact directory`: capture, rewrite for both layouts, save, compile for this machine."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lragent.artifact.compiled_files import compiled_file, place_compiled, unit_of
from lragent.artifact.directory import new_directory, open_artifact, require_free
from lragent.artifact.manifest import AgentEntry, LayerEntry, LayoutEntry, Manifest, write_manifest
from lragent.artifact.misses import misses_by_layout
from lragent.artifact.tokenizer import write_tokenizer
from lragent.artifact.weights import write_weights
from lragent.capture.capture import capture
from lragent.compile.compile import compile_graph, require_compiler, target_name
from lragent.compile.export import export_graph, save_without_weights, tensors_of
from lragent.compile.fingerprint import fingerprint
from lragent.errors import ArtifactError, Miss, SplitRefused
from lragent.files.checked_file import FileEntry, describe_file
from lragent.kernels.dispatch import graphs, resolve
from lragent.loading.agent_slots import slots_of
from lragent.loading.model import LoadedModel
from lragent.loading.stages import Stages
from lragent.passes.pipeline import Transformed, lower, transform
from lragent.program.cache_schema import Layout
from lragent.program.dtypes import LAYOUTS, dtype_name
from lragent.program.step import PAGE_SIZE
from lragent.runtime.cache_cost import advice, bytes_per_token

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did: seconds by stage, compiled packages, why split layout was refused ("" if it was not),
    what to think of before sharing (`runtime/cache_cost.py`), and why unit "layer" became "model" ("" if it did not).

    `misses`: layout -> every place where a pass did not match, the layers that don't run the chosen attention
    implementation among them, or every place for which the layout was refused; layouts without misses are left out.
    """

    out: Path
    agents: tuple[str, ...]
    seconds: Mapping[str, float]
    compiled: tuple[str, ...]
    refusal: str
    advice: str = ""
    unit_refusal: str = ""
    misses: Mapping[str, tuple[Miss, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewritten:
    """A model's programs by layout, and why split layout was refused: in words ("" if it was not), and every place."""

    programs: Mapping[Layout, Transformed]
    refusal: str = ""
    refused: tuple[Miss, ...] = ()


def rewrite(loaded: LoadedModel, wanted: Sequence[Layout], stages: Stages) -> Rewritten:
    """Captures the model and rewrites it for every layout that its graph allows.

    Raises:
        SplitRefused: a layout in `wanted` is refused.
    """
    captured = stages.run("capture", lambda: capture(loaded))
    programs: dict[Layout, Transformed] = {}
    refusal: SplitRefused | None = None
    for layout in LAYOUTS:
        try:
            programs[layout] = stages.run(f"rewrite {layout}", partial(transform, captured, layout))
        except SplitRefused as error:
            if layout in wanted or layout == "dense":
                raise
            refusal = error
    return Rewritten(programs) if refusal is None else Rewritten(programs, refusal.message, refusal.misses)


def build(
    loaded: LoadedModel,
    out: Path,
    compile_layouts: Sequence[Layout],
    attention: str,
    overwrite: bool,
    stages: Stages,
    wanted: Sequence[Layout] | None = None,
    unit: str = "model",
) -> ConvertReport:
    """Captures a loaded model and writes its artifact.

    Args:
        compile_layouts: layouts compiled for this machine.
        attention: the implementation that they are compiled with (`lragent.kernels.dispatch.resolve`).
        unit: what is compiled at once (`lragent.compile.compile.UNITS`).
        wanted: layouts that must not be refused; `compile_layouts` if None.

    Raises:
        UserError: a kind that says what was found; nothing is left behind.
    """
    require_free(out, overwrite)
    if compile_layouts:
        require_compiler()
    rewritten = rewrite(loaded, compile_layouts if wanted is None else wanted, stages)
    return write(loaded, rewritten, out, compile_layouts, attention, overwrite, stages, unit)


def write(
    loaded: LoadedModel,
    rewritten: Rewritten,
    out: Path,
    compile_layouts: Sequence[Layout],
    attention: str,
    overwrite: bool,
    stages: Stages,
    unit: str,
) -> ConvertReport:
    """Writes rewritten programs as an artifact and compiles some of them for this machine."""
    names = graphs(resolve(attention, "cpu")) if compile_layouts else ()
    with new_directory(out, overwrite) as directory:
        manifest = replace(write_programs(loaded, rewritten, directory, stages), unit=unit)
        if overwrite:
            _keep_packages(out, manifest, directory)
        packages: dict[str, FileEntry] = {}
        unit_refusal = ""
        kept = manifest.compiled.get(target_name(), {})
        for layout in compile_layouts:
            for name in names:
                key = f"{layout}-{name}-{dtype_name(loaded.dtype)}"
                if key not in kept:
                    work = partial(_compile, rewritten.programs[layout], loaded.dtype, name, directory, key, unit)
                    stage = f"compile {layout}" if len(names) == 1 else f"compile {layout} ({name})"
                    packages[key], refused = stages.run(stage, work)
                    unit_refusal = unit_refusal or refused
        if packages:
            manifest.compiled[target_name()] = {**kept, **packages}
        write_manifest(manifest, directory)
    agents = tuple(agent.name for agent in loaded.agents if agent.digest)
    sizes = bytes_per_token({n: e.schema for n, e in manifest.layouts.items()}, agents, manifest.dtype)
    return ConvertReport(
        out,
        agents,
        dict(stages.seconds),
        tuple(packages),
        rewritten.refusal,
        advice(sizes),
        unit_refusal,
        misses_by_layout(manifest.layouts.items(), rewritten.refused, names or graphs(attention)),
    )


def write_programs(loaded: LoadedModel, rewritten: Rewritten, directory: Path, stages: Stages) -> Manifest:
    """Writes programs, weights and tokenizer; returns the manifest, which is not written yet."""
    tensors: dict[str, Tensor] = {}
    slots = slots_of(loaded, spare=0)
    layouts: dict[str, LayoutEntry] = {}
    (directory / "programs").mkdir()
    for layout, program in rewritten.programs.items():
        relative = f"programs/{layout}.pt2"
        stages.run(f"export {layout}", partial(_export, program, loaded.dtype, directory / relative))
        tensors.update(tensors_of(program.graph))
        layouts[layout] = LayoutEntry(
            program=describe_file(directory, relative),
            schema=program.schema,
            layers=tuple(
                LayerEntry(layer.index, layer.k_module, layer.v_module, layer.key_transform) for layer in program.layers
            ),
            misses=program.misses,
            fallbacks=dict(program.fallbacks),
            fingerprint=fingerprint(program.graph, program.schema),
        )
    from_adapters = adapter_constants(loaded, tensors)
    weights, aliases = stages.run("write weights", lambda: write_weights(directory, tensors, from_adapters))
    return Manifest(
        versions={name: version(name) for name in ("lragent", "torch", "transformers", "peft")},
        architecture=loaded.architecture,
        max_positions=loaded.max_positions,
        vocab_size=loaded.vocab_size,
        stop_token_ids=loaded.stop_token_ids,
        dtype=dtype_name(loaded.dtype),
        page_size=PAGE_SIZE,
        agents=agent_entries(loaded),
        layouts=layouts,
        refusal=rewritten.refusal,
        refused=rewritten.refused,
        weights=weights,
        aliases=aliases,
        tokenizer=write_tokenizer(loaded.tokenizer_source, directory),
        slot_ranks=dict(slots.ranks),
        slot_groups=dict(slots.groups),
    )


def adapter_constants(loaded: LoadedModel, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the constants that adapters became; all others are the base model's."""
    model_names = {f"model.{name}" for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    return frozenset(name for name in tensors if name not in model_names and name.startswith(("lora_", "up_")))


def agent_entries(loaded: LoadedModel) -> tuple[AgentEntry, ...]:
    return tuple(
        AgentEntry(agent.name, agent.digest, agent.rank, _scalings(loaded, agent.name), agent.targets)
        for agent in loaded.agents
    )


def _keep_packages(old: Path, manifest: Manifest, directory: Path) -> None:
    """Takes over packages of the artifact that is replaced, for any target, whose programs (and versions of
    what compiled them, and unit) are the same."""
    if not old.exists():
        return
    try:
        replaced = open_artifact(old)
        if replaced.manifest.versions != manifest.versions:
            return
        for target, packages in replaced.manifest.compiled.items():
            for key, entry in packages.items():
                layout = key.partition("-")[0]
                before, now = replaced.manifest.layouts.get(layout), manifest.layouts.get(layout)
                alike = manifest.unit in (replaced.manifest.unit, unit_of(entry))
                if alike and before is not None and now is not None and before.fingerprint == now.fingerprint:
                    kept = place_compiled(compiled_file(replaced, entry), directory, target, key)
                    manifest.compiled.setdefault(target, {})[key] = kept
    except ArtifactError as error:
        log.warning("packages of the artifact that is replaced are not kept: %s", error.message)


def _scalings(loaded: LoadedModel, agent: str) -> tuple[float, ...]:
    return tuple(sorted({by_agent[agent].scaling for by_agent in loaded.lora.values() if agent in by_agent}))


def _export(program: Transformed, dtype: torch.dtype, path: Path) -> None:
    save_without_weights(export_graph(program.graph, program.schema, dtype), path)


def _compile(
    program: Transformed, dtype: torch.dtype, graph_name: str, directory: Path, key: str, unit: str
) -> tuple[FileEntry, str]:
    """What was compiled, and why not by layer although that was asked for ("": it was, or was not asked for)."""
    with tempfile.TemporaryDirectory() as scratch:
        lowered = lower(program.graph, graph_name).graph
        built = compile_graph(lowered, program.schema, dtype, graph_name, unit, Path(scratch))
        return place_compiled(built.file, directory, target_name(), key), built.refusal
