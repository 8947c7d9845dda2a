"""`LoadedModel -> artifact directory`: rewrite for both layouts, save, compile for this machine."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from lragent.artifact.adapter_map_file import write_map
from lragent.artifact.compiled_files import CompiledKey, compiled_file, place_compiled, unit_of
from lragent.artifact.directory import new_directory, open_artifact, require_free
from lragent.artifact.manifest import LayoutEntry, Manifest, write_manifest
from lragent.artifact.misses import misses_by_layout
from lragent.artifact.tokenizer import artifact_tokenizer, with_stops, write_tokenizer
from lragent.artifact.weights import write_weights
from lragent.compile.compile import compile_graph, require_compiler, target_name
from lragent.compile.export import tensors_of
from lragent.compile.fingerprint import fingerprint
from lragent.compile.live_adapters.a_digest import with_a_digests
from lragent.errors import ArtifactError, Miss
from lragent.files.checked_file import FileEntry, describe_file
from lragent.graph.graph_file import write_graph
from lragent.kernels.dispatch import graphs, resolve
from lragent.loading.agent_slots import agent_slots_of
from lragent.loading.model import LoadedModel
from lragent.loading.stages import Stages
from lragent.passes.pipeline import Rewritten, Transformed, lower, rewrite
from lragent.program.cache_schema import Layout
from lragent.program.dtypes import dtype_name
from lragent.program.step import PAGE_SIZE
from lragent.runtime.cache_cost import advice, bytes_per_token
from lragent.text.choose_tokenizer import ArtifactTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """Options for writing an artifact.

    Args:
        compiled: layouts that are compiled for this machine.
        attention: the implementation with which they are compiled (`lragent.kernels.dispatch.resolve`), or "auto".
        unit: the unit in which they are compiled (`lragent.compile.compile.UNITS`).
        overwrite: True replaces an artifact of the same name.
    """

    compiled: tuple[Layout, ...] = ()
    attention: str = "auto"
    unit: str = "model"
    overwrite: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """A report on an artifact that was written or updated.

    Args:
        seconds: wall time by stage.
        compiled: keys of the packages that were compiled now.
        refusal: reason for which split layout was refused; "" if it was not.
        advice: a note on cache memory (`lragent.runtime.cache_cost.advice`); "" if there is none.
        unit_refusal: reason for which unit "layer" became "model"; "" if it did not.
        misses: layout -> every place where a pass did not match. That includes layers that don't run the chosen
            attention implementation, and every place for which the layout was refused. Layouts without misses are
            left out.
        notes: see `lragent.loading.model.LoadedModel`.
        tokenizer: sentences about the tokenizer: that there is none, or whose it is, or that it changes some text.
    """

    out: Path
    agents: tuple[str, ...]
    seconds: Mapping[str, float]
    compiled: tuple[str, ...]
    refusal: str
    advice: str = ""
    unit_refusal: str = ""
    misses: Mapping[str, tuple[Miss, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()


def build(
    loaded: LoadedModel,
    out: Path,
    *,
    options: BuildOptions,
    stages: Stages,
    wanted: Sequence[Layout] | None = None,
) -> ConvertReport:
    """Rewrites a loaded model and writes its artifact.

    Args:
        wanted: layouts that must not be refused; None: those that are compiled.

    Raises:
        UserError: a kind that says what was found; nothing is left behind.
    """
    require_free(out, options.overwrite)
    if options.compiled:
        require_compiler()
    text = artifact_tokenizer(loaded)
    rewritten = rewrite(loaded, options.compiled if wanted is None else wanted, stages)
    return write(loaded, rewritten, text, out, options=options, stages=stages)


def write(
    loaded: LoadedModel,
    rewritten: Rewritten,
    text: ArtifactTokenizer,
    out: Path,
    *,
    options: BuildOptions,
    stages: Stages,
) -> ConvertReport:
    """Writes rewritten programs as an artifact and compiles some of them for this machine.

    Raises:
        ArtifactError, CompilerMissing: say what was found; nothing is left behind.
    """
    names = graphs(resolve(options.attention, "cpu")) if options.compiled else ()
    with new_directory(out, options.overwrite) as directory:
        manifest = replace(write_programs(loaded, rewritten, text, directory, stages), unit=options.unit)
        if options.overwrite:
            _keep_packages(out, manifest, directory)
        packages: dict[str, FileEntry] = {}
        unit_refusal = ""
        kept = manifest.compiled.get(target_name(), {})
        for layout in options.compiled:
            for name in names:
                key = CompiledKey(layout, name, loaded.dtype)
                if str(key) not in kept:
                    work = partial(_compile, rewritten.programs[layout], directory, key, options.unit)
                    stage = f"compile {layout}" if len(names) == 1 else f"compile {layout} ({name})"
                    packages[str(key)], refused = stages.run(stage, work)
                    unit_refusal = unit_refusal or refused
        if packages:
            manifest.compiled[target_name()] = {**kept, **packages}
        write_manifest(manifest, directory)
    # With "auto" and nothing compiled, no implementation is chosen, so that no layer falls back yet.
    reported = names if options.compiled or options.attention == "auto" else graphs(options.attention)
    agents = tuple(agent.name for agent in loaded.agents if not agent.spare)
    sizes = bytes_per_token({n: e.schema for n, e in manifest.layouts.items()}, agents, manifest.dtype)
    return ConvertReport(
        out=out,
        agents=agents,
        seconds=dict(stages.seconds),
        compiled=tuple(packages),
        refusal=rewritten.refusal,
        advice=advice(sizes),
        unit_refusal=unit_refusal,
        misses=misses_by_layout(manifest.layouts.items(), rewritten.refused, reported),
        notes=loaded.notes,
        tokenizer=text.notes,
    )


def write_programs(
    loaded: LoadedModel, rewritten: Rewritten, text: ArtifactTokenizer, directory: Path, stages: Stages
) -> Manifest:
    """Writes programs, weights and tokenizer; returns the manifest, which is still to be written."""
    tensors: dict[str, Tensor] = {}
    agent_slots = agent_slots_of(loaded, spare=0)
    layouts: dict[str, LayoutEntry] = {}
    (directory / "programs").mkdir()
    for layout, program in rewritten.programs.items():
        relative = f"programs/{layout}.json"
        write_graph(program.graph, directory / relative)
        tensors.update(tensors_of(program.graph))
        layouts[layout] = LayoutEntry(
            program=describe_file(directory, relative),
            adapter_map=write_map(program.adapter_map, directory, f"programs/{layout}-adapters.safetensors"),
            schema=program.schema,
            layers=program.layers,
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
        stop_token_ids=text.stop_token_ids,
        dtype=dtype_name(loaded.dtype),
        page_size=PAGE_SIZE,
        agents=with_a_digests(with_stops(loaded.agents, text), loaded.lora, rewritten.split_map),
        layouts=layouts,
        refusal=rewritten.refusal,
        refused=rewritten.refused,
        weights=weights,
        aliases=aliases,
        tokenizer=write_tokenizer(text, directory),
        chat_templates={agent: dict(templates) for agent, templates in text.templates.items()},
        agent_slot_ranks=dict(agent_slots.ranks),
        agent_slot_groups=dict(agent_slots.groups),
        sources=dict(loaded.sources),
    )


def adapter_constants(loaded: LoadedModel, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the constants that come from adapters; all others are the base model's."""
    model_names = {f"model.{name}" for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    return frozenset(name for name in tensors if name not in model_names and name.startswith("lora_"))


def _keep_packages(old: Path, manifest: Manifest, directory: Path) -> None:
    """Copies compiled files from the artifact that is replaced, for all targets.

    A file is kept if versions, unit and program are the same in both artifacts.
    """
    if not old.exists():
        return
    try:
        replaced = open_artifact(old)
        if replaced.manifest.versions != manifest.versions:
            return
        for target, packages in replaced.manifest.compiled.items():
            for key, entry in packages.items():
                layout = CompiledKey.parse(key).layout
                before, now = replaced.manifest.layouts.get(layout), manifest.layouts.get(layout)
                alike = manifest.unit in (replaced.manifest.unit, unit_of(entry))
                if alike and before is not None and now is not None and before.fingerprint == now.fingerprint:
                    kept = place_compiled(compiled_file(replaced, entry), directory, target, CompiledKey.parse(key))
                    manifest.compiled.setdefault(target, {})[key] = kept
    except ArtifactError as error:
        log.warning("packages of the artifact that is replaced are not kept: %s", error.message)


def _compile(program: Transformed, directory: Path, key: CompiledKey, unit: str) -> tuple[FileEntry, str]:
    """Compiles a program into an artifact; returns the file to load and `lragent.compile.compile.Compiled.refusal`."""
    with tempfile.TemporaryDirectory() as scratch:
        lowered = lower(program.graph, key.graph).graph
        built = compile_graph(lowered, program.schema, key.kv_dtype, key.graph, unit, Path(scratch))
        return place_compiled(built.file, directory, target_name(), key), built.refusal
