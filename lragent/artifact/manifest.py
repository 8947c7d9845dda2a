"""`manifest.json` of an artifact: agents, layouts, files with their hashes, and the versions that wrote them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lragent.errors import ArtifactError, Miss
from lragent.files.checked_file import FileEntry
from lragent.files.replace_file import replacing
from lragent.program.agent import Agent
from lragent.program.cache_schema import BaseStreams, CacheSchema, Layout, LowRankStream
from lragent.program.layer_facts import LayerFacts

FORMAT = 5
MANIFEST = "manifest.json"
SEAL = "seal"  # sha256 of the other entries
LONGEST = 60  # characters of an entry that `identity` gives as it is


@dataclass(frozen=True)
class LayoutEntry:
    """One rewritten program and its cache schema.

    Args:
        misses, fallbacks: see `lragent.passes.pipeline.Transformed`.
        adapter_map: file of the map of its constants that follow from adapters (`adapter_map_file`).
        fingerprint: a hash of everything that packages compiled from it depend on (`lragent.compile.fingerprint`).
    """

    program: FileEntry
    adapter_map: FileEntry
    schema: CacheSchema
    layers: tuple[LayerFacts, ...]
    misses: tuple[Miss, ...]
    fallbacks: dict[str, tuple[Miss, ...]]
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of an artifact without reading its other files.

    Args:
        dtype: of weights and computation; page_size: tokens a page.
        refusal, refused: message and every place of a refused split layout; empty if it was not refused.
        weights: weight files; aliases: name of a tied tensor -> name under which it is stored.
        tokenizer: files of its tokenizer, in one folder; empty if it has none.
        chat_templates: agent -> name -> template, of agents with chat templates of their own.
        agent_slot_ranks, agent_slot_groups: see `lragent.loading.agent_slots.AgentSlots`.
        compiled: target -> `CompiledKey` as text -> the file to load (`lragent.artifact.compiled_files`).
        unit: "model" or "layer", used when the artifact is compiled for another machine.
        sources: agent, or `base` for the model -> hub id and commit; see `lragent.loading.model.LoadedModel`.
    """

    versions: dict[str, str]
    architecture: str
    max_positions: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    dtype: str
    page_size: int
    agents: tuple[Agent, ...]
    layouts: dict[str, LayoutEntry]
    refusal: str
    refused: tuple[Miss, ...]
    weights: tuple[FileEntry, ...]
    aliases: dict[str, str]
    tokenizer: tuple[FileEntry, ...]
    chat_templates: dict[str, dict[str, str]]
    agent_slot_ranks: dict[str, tuple[int, ...]]
    agent_slot_groups: dict[str, tuple[int, ...]]
    compiled: dict[str, dict[str, FileEntry]] = field(default_factory=dict)
    unit: str = "model"
    sources: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """All entries, and a seal over them by which later changes are found."""
        raw = dataclasses.asdict(self)
        return json.dumps({**raw, SEAL: seal_of(raw)}, indent=1)


def seal_of(raw: Mapping[str, Any]) -> str:
    """sha256 of a manifest's entries without its seal, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def identity(manifest: Manifest) -> dict[str, Any]:
    """All entries but those of compiled packages, to which other machines add (`Program.identity`).

    Long entries are given by their hash.
    """
    raw = dataclasses.asdict(manifest)
    del raw["compiled"]
    named = {
        "agents": {agent["name"]: _brief(agent) for agent in raw.pop("agents")},
        "layouts": {name: _brief(layout) for name, layout in raw.pop("layouts").items()},
        "weights": {file["path"]: _brief(file) for file in raw.pop("weights")},
        "versions": raw.pop("versions"),
    }
    return {**named, **{name: _brief(value) for name, value in raw.items()}}


def _brief(value: Any) -> Any:
    """A short entry as JSON gives it back, a long one as its sha256."""
    text = json.dumps(value, sort_keys=True)
    return json.loads(text) if len(text) <= LONGEST else hashlib.sha256(text.encode()).hexdigest()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Replaces the manifest in one step. The caller holds the artifact's lock (`lragent.files.locks`)."""
    with replacing(directory / MANIFEST) as file:
        file.write(manifest.to_json().encode())


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
        ArtifactError: there is no artifact, its format version is another one, or the manifest was damaged or changed
            or lacks an entry.
    """
    file = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"no artifact directory at {directory}", "Make one with `lragent convert`.")
    if not file.is_file():
        raise ArtifactError(f"{directory} has no {MANIFEST}", "It is not an artifact; make one with `lragent convert`.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}", "The artifact is damaged; convert again.") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise ArtifactError(
            f"{file} has format version {found!r}, this lragent reads version {FORMAT}",
            "Convert the model again with this version.",
        )
    seal = raw.pop(SEAL, None)
    if seal is None:
        raise ArtifactError(f"{file} has no {SEAL}", "Restore the file, or convert the model again.")
    if seal != seal_of(raw):
        raise ArtifactError(f"{file} was changed after it was written", "Restore the file, or convert the model again.")
    try:
        return _from_json(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} is damaged: {type(error).__name__}: {error}", "Convert the model again."
        ) from error


def _from_json(raw: dict[str, Any]) -> Manifest:
    _require_entries(raw, Manifest)
    return Manifest(
        **{
            **raw,
            "stop_token_ids": tuple(raw["stop_token_ids"]),
            "sources": dict(raw["sources"]),
            "agents": tuple(_agent(entry) for entry in raw["agents"]),
            "layouts": {name: _layout(entry) for name, entry in raw["layouts"].items()},
            "refused": _misses(raw["refused"]),
            "weights": tuple(FileEntry(**entry) for entry in raw["weights"]),
            "tokenizer": tuple(FileEntry(**entry) for entry in raw["tokenizer"]),
            "agent_slot_ranks": {module: tuple(ranks) for module, ranks in raw["agent_slot_ranks"].items()},
            "agent_slot_groups": {module: tuple(group) for module, group in raw["agent_slot_groups"].items()},
            "compiled": {
                target: {key: FileEntry(**entry) for key, entry in packages.items()}
                for target, packages in raw["compiled"].items()
            },
        }
    )


def _require_entries(raw: Mapping[str, Any], kind: type[Manifest] | type[LayoutEntry]) -> None:
    """Raises ValueError unless a JSON object has exactly the fields of a dataclass, those with defaults included."""
    known = {field.name for field in dataclasses.fields(kind)}
    for found, names in (("unknown", set(raw) - known), ("missing", known - set(raw))):
        if names:
            raise ValueError(f"{found} entries {sorted(names)}")


def _agent(raw: dict[str, Any]) -> Agent:
    return Agent(**{**raw, **{name: tuple(raw[name]) for name in ("scalings", "targets", "stop_token_ids")}})


def _misses(raw: list[dict[str, str]]) -> tuple[Miss, ...]:
    return tuple(Miss(**entry) for entry in raw)


def _layout(raw: dict[str, Any]) -> LayoutEntry:
    _require_entries(raw, LayoutEntry)
    schema = raw["schema"]
    layout: Layout = schema["layout"]
    return LayoutEntry(
        program=FileEntry(**raw["program"]),
        adapter_map=FileEntry(**raw["adapter_map"]),
        schema=CacheSchema(
            layout=layout,
            agents=tuple(schema["agents"]),
            base=tuple(BaseStreams(**entry) for entry in schema["base"]),
            low_rank=tuple(
                LowRankStream(entry["module"], tuple(entry["ranks"]), tuple(entry["shares_a_with"]))
                for entry in schema["low_rank"]
            ),
        ),
        layers=tuple(LayerFacts(**entry) for entry in raw["layers"]),
        misses=_misses(raw["misses"]),
        fallbacks={name: _misses(entries) for name, entries in raw["fallbacks"].items()},
        fingerprint=raw["fingerprint"],
    )
