"""`convert --update`: puts other adapters into an artifact and keeps its compiled programs.

The model is loaded, captured and rewritten again with the new adapters in the artifact's slots. The programs must stay
the same; then only adapter weights differ. They are written beside the old ones, and the manifest is replaced in one
step. If the update is interrupted, the artifact is the old one or the new one.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lragent.artifact.build import ConvertReport, adapter_constants
from lragent.artifact.directory import cannot_write, open_artifact, place
from lragent.artifact.kept_drift import remove_kept_drift
from lragent.artifact.manifest import read_manifest, write_manifest
from lragent.artifact.misses import misses_by_layout
from lragent.artifact.tokenizer import TOKENIZER, artifact_tokenizer, replace_tokenizer, with_stops
from lragent.artifact.weights import ADAPTER_FILES, ADAPTER_WEIGHTS, save_tensors, stored_once
from lragent.compile.export import tensors_of
from lragent.compile.fingerprint import fingerprint
from lragent.compile.live_adapters.a_digest import with_a_digests
from lragent.errors import ArtifactError
from lragent.files.checked_file import FileEntry
from lragent.files.locks import directory_lock
from lragent.loading.agent_slots import AgentSlots, assign, fit
from lragent.loading.model import load_directories
from lragent.loading.stages import Stages
from lragent.passes.pipeline import rewrite
from lragent.program.agent import BASE
from lragent.program.dtypes import LAYOUTS
from lragent.runtime.cache_cost import advice, bytes_per_token

_AGAIN = "Convert the model again."
_SCRATCH = ".update-"


def update(path: Path, model_dir: str | Path, adapters: Mapping[str, str | Path], stages: Stages) -> ConvertReport:
    """Gives an artifact other adapters.

    Args:
        adapters: all agents of the artifact after the update; the slot of an agent that is left out becomes spare.

    Raises:
        AdapterError: an adapter does not fit the artifact's slots; names agent, module and sizes.
        ArtifactError: base model, version or programs differ; names the first difference.
    """
    artifact = open_artifact(path)
    manifest = artifact.manifest
    pins = {name: pin for name, pin in manifest.sources.items() if name == BASE}
    loaded = stages.run("load", lambda: load_directories(model_dir, adapters, manifest.dtype, pins))
    agent_slots = AgentSlots(
        tuple(agent.name for agent in manifest.agents), manifest.agent_slot_ranks, manifest.agent_slot_groups
    )
    text = artifact_tokenizer(loaded)
    loaded = fit(loaded, assign(agent_slots, tuple(adapters)))
    rewritten = rewrite(loaded, tuple(layout for layout in LAYOUTS if layout in manifest.layouts), stages)
    programs = rewritten.programs
    tensors: dict[str, Tensor] = {}
    for program in programs.values():
        tensors.update(tensors_of(program.graph))
    held = artifact.weights()
    layouts = dict(manifest.layouts)
    for layout, program in programs.items():
        before = layouts.get(layout)
        if before is None or fingerprint(program.graph, program.schema) != before.fingerprint:
            raise ArtifactError(f"the {layout} program of {path} would change: {_difference(tensors, held)}", _AGAIN)
        layouts[layout] = dataclasses.replace(before, schema=program.schema)
    stored, aliases = stored_once(tensors)
    names = adapter_constants(loaded, tensors)
    for name, tensor in stored.items():
        if name not in names and not (name in held and torch.equal(held[name], tensor)):
            raise ArtifactError(f"{path} was made from another base model: {name} differs", _AGAIN)
    base = tuple(entry for entry in manifest.weights if not entry.path.startswith(ADAPTER_FILES))
    acting = tuple(agent.name for agent in loaded.agents if not agent.spare)
    agents = with_a_digests(with_stops(loaded.agents, text), loaded.lora, rewritten.split_map)

    def write(weights: dict[str, Tensor]) -> None:
        with directory_lock(path):
            _remove_scratch(path)
            written = _write_adapters(path, weights)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=path) as scratch:
                tokenizer = replace_tokenizer(text, Path(scratch), artifact)
            updated = dataclasses.replace(
                manifest,
                agents=agents,
                tokenizer=tokenizer,
                chat_templates={agent: dict(templates) for agent, templates in text.templates.items()},
                weights=(*base, written),
                aliases=aliases,
                layouts=layouts,
                sources={**pins, **loaded.sources},
                compiled=read_manifest(path).compiled,  # another process may have added a package
            )
            remove_kept_drift(path)
            write_manifest(updated, path)
            _remove_others(path, written, tokenizer)

    try:
        stages.run("write weights", lambda: write({n: stored[n] for n in stored if n in names}))
    except OSError as error:
        raise cannot_write(path, error) from error
    sizes = bytes_per_token({name: entry.schema for name, entry in layouts.items()}, acting, manifest.dtype)
    misses = misses_by_layout(layouts.items(), manifest.refused, graph_names=())
    return ConvertReport(
        out=path,
        agents=acting,
        seconds=dict(stages.seconds),
        compiled=(),
        refusal=manifest.refusal,
        advice=advice(sizes),
        misses=misses,
        notes=loaded.notes,
        tokenizer=text.notes,
    )


def _write_adapters(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    """Writes the adapters' file under a name that holds its hash."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=path) as scratch:
        built = save_tensors(Path(scratch), Path(ADAPTER_WEIGHTS).name, tensors)
        return place(Path(scratch) / built.path, path, f"{ADAPTER_FILES}-{built.sha256[:12]}.safetensors")


def _remove_scratch(path: Path) -> None:
    """Removes what an update that was killed has left."""
    for left in path.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left)


def _remove_others(path: Path, written: FileEntry, tokenizer: tuple[FileEntry, ...]) -> None:
    """Removes the adapter files and tokenizers that the manifest does not name."""
    for file in path.glob(f"{ADAPTER_FILES}*"):
        if file != path / written.path:
            file.unlink()
    named = {entry.path.partition("/")[0] for entry in tokenizer}
    for folder in path.glob(f"{TOKENIZER}*"):
        if folder.name not in named:
            shutil.rmtree(folder)


def _difference(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> str:
    """Describes the first constant whose form differs."""
    for name, tensor in tensors.items():
        if name not in held:
            return f"it needs {name} {list(tensor.shape)}, which the artifact lacks"
        before = held[name]
        if before.shape != tensor.shape or before.dtype != tensor.dtype:
            return f"{name} is {before.dtype} {list(before.shape)}, it would be {tensor.dtype} {list(tensor.shape)}"
    return "its code differs (another kind of adapter, or another version of lragent, torch or transformers)"
