"""Describes an artifact, or the artifact that a model with adapters would give: agents, streams, bytes, misses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lragent.artifact.directory import open_artifact
from lragent.artifact.kept_drift import read_kept_drift
from lragent.artifact.misses import misses_by_layout
from lragent.errors import Miss
from lragent.program.agent import Agent
from lragent.program.cache_schema import CacheSchema
from lragent.program.dtypes import dtype_name
from lragent.program.layer_facts import LayerFacts
from lragent.runtime.cache_cost import break_even, bytes_per_token


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive attention ops with equal shapes, LR widths and key transforms.

    Args:
        k_lr_width, v_lr_width: LR numbers per token.
        shares_lr: True if K and V read the same LR stream.
    """

    first: int
    last: int
    kv_heads: int
    k_dim: int
    v_dim: int
    k_lr_width: int
    v_lr_width: int
    shares_lr: bool
    key_transform: str


@dataclass(frozen=True)
class Inspection:
    """A report on an artifact or a model.

    Args:
        source: its path.
        bytes_per_token: scheme -> bytes of cache of one token, over all layers, in the artifact's dtype, after 1, 2,
            ... all agents have seen it. A refused scheme is missing.
        refusal: reason for which split layout was refused; "" if it was not.
        compiled: target -> keys of its compiled files.
        spare: number of slots without agent.
        misses: layout -> every place where a pass did not match, or for which the layout was refused. Layers that an
            attention implementation can't run are listed for each implementation.
        notes, sources: see `lragent.loading.model.LoadedModel`.
        drift: scheme -> measured drift that the artifact keeps, in nats per token of the agent that drifts most.
    """

    source: str
    architecture: str
    dtype: str
    max_positions: int
    agents: tuple[Agent, ...]
    layers: tuple[LayerGroup, ...]
    bytes_per_token: Mapping[str, tuple[int, ...]]
    refusal: str
    compiled: Mapping[str, tuple[str, ...]]
    spare: int = 0
    misses: Mapping[str, tuple[Miss, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)

    @property
    def break_even(self) -> dict[str, int | None]:
        """Split scheme -> smallest number of agents at which a token takes less than in `non_shared`; None: never."""
        return break_even(self.bytes_per_token)

    def tokens_that_fit(self, memory: int) -> dict[str, tuple[int, ...]]:
        """Scheme -> number of tokens in `memory` bytes of cache, by number of agents that have seen them."""
        return {name: tuple(memory // b for b in by_agents) for name, by_agents in self.bytes_per_token.items()}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect_artifact(path: Path) -> Inspection:
    """Reads an artifact's manifest and its kept drift, and no other file."""
    artifact = open_artifact(path)
    manifest = artifact.manifest
    entry = manifest.layouts.get("split") or manifest.layouts["dense"]
    acting = tuple(agent for agent in manifest.agents if not agent.spare)
    return Inspection(
        source=str(path),
        architecture=manifest.architecture,
        dtype=manifest.dtype,
        max_positions=manifest.max_positions,
        agents=acting,
        layers=_groups(entry.schema, entry.layers),
        bytes_per_token=bytes_per_token(
            {name: e.schema for name, e in manifest.layouts.items()},
            tuple(agent.name for agent in acting),
            manifest.dtype,
        ),
        refusal=manifest.refusal,
        compiled={target: tuple(packages) for target, packages in manifest.compiled.items()},
        spare=len(manifest.agents) - len(acting),
        misses=misses_by_layout(manifest.layouts.items(), manifest.refused),
        sources=manifest.sources,
        drift={name: found.worst()[1] for name, found in read_kept_drift(artifact).items()},
    )


def inspect_model(model_dir: str | Path, adapters: Mapping[str, str | Path]) -> Inspection:
    """Loads, captures and rewrites a model; nothing is compiled or written.

    Raises:
        SplitRefused: no layout is possible; `misses` holds every refused place.
    """
    from lragent.compile.live_adapters.a_digest import with_a_digests
    from lragent.loading.model import load_directories
    from lragent.loading.stages import Stages
    from lragent.passes.pipeline import rewrite

    loaded = load_directories(model_dir, adapters)
    rewritten = rewrite(loaded, (), Stages())
    programs = rewritten.programs
    shown = programs.get("split") or programs["dense"]
    return Inspection(
        source=str(model_dir),
        architecture=loaded.architecture,
        dtype=dtype_name(loaded.dtype),
        max_positions=loaded.max_positions,
        agents=with_a_digests(loaded.agents, loaded.lora, rewritten.split_map),
        layers=_groups(shown.schema, shown.layers),
        bytes_per_token=bytes_per_token(
            {name: p.schema for name, p in programs.items()},
            tuple(a.name for a in loaded.agents),
            dtype_name(loaded.dtype),
        ),
        refusal=rewritten.refusal,
        compiled={},
        misses=misses_by_layout(programs.items(), rewritten.refused),
        notes=loaded.notes,
        sources=loaded.sources,
    )


def _groups(schema: CacheSchema, layers: tuple[LayerFacts, ...]) -> tuple[LayerGroup, ...]:
    widths = {stream.module: stream.width for stream in schema.low_rank}
    groups: list[LayerGroup] = []
    for base in schema.base:
        facts = layers[base.index] if layers else None
        k_module, v_module = (facts.k_module, facts.v_module) if facts else (None, None)
        group = LayerGroup(
            first=base.index,
            last=base.index,
            kv_heads=base.kv_heads,
            k_dim=base.k_dim,
            v_dim=base.v_dim,
            k_lr_width=widths.get(k_module, 0) if k_module else 0,
            v_lr_width=widths.get(v_module, 0) if v_module else 0,
            shares_lr=k_module is not None and k_module == v_module,
            key_transform=facts.key_transform if facts else "not split",
        )
        previous = groups[-1] if groups else None
        if previous is not None and dataclasses.replace(previous, last=base.index) == dataclasses.replace(
            group, first=previous.first
        ):
            groups[-1] = dataclasses.replace(previous, last=base.index)
        else:
            groups.append(group)
    return tuple(groups)
