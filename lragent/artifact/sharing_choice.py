"""Chooses the sharing scheme of an engine: the one asked for, or for "auto" the one that evidence speaks for.

A shared cache changes what adapters compute, and some lose everything (docs/quality.md). So "auto" shares only if the
adapters were tuned for a scheme, or if a scheme's drift was measured for them and is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lragent.artifact.directory import Artifact
from lragent.artifact.kept_drift import read_kept_drift
from lragent.artifact.manifest import Manifest
from lragent.program.agent import Agent, tuned_scheme
from lragent.program.cache_schema import CacheSchema, Layout
from lragent.program.defaults import AUTO
from lragent.program.drift import SchemeDrift
from lragent.program.dtypes import dtype_name, dtype_named
from lragent.runtime.cache_cost import bytes_per_token
from lragent.runtime.cheapest_scheme import cheapest_within, require_max_kl
from lragent.runtime.evidence import Reason
from lragent.runtime.schemes import EXACT, SCHEMES, scheme_named

SUGGESTED = "base_lr_shared"  # named where nothing is shared and something could be
_TUNE = "`lragent tune` makes adapters that stand it"


@dataclass(frozen=True)
class SharingChoice:
    """A sharing scheme and the reason to trust it.

    Args:
        reason: "exact": the scheme is `non_shared`; "tuned": the adapters were tuned for it; "measured": its drift
            was measured and is small; "none".
        notes: one line each, for the user.
    """

    scheme: str
    reason: Reason
    notes: tuple[str, ...] = ()


def require_sharing(asked: str) -> None:
    """Raises RequestError unless `asked` is a sharing scheme or "auto"."""
    if asked != AUTO:
        scheme_named(asked)


def choice_of_artifact(artifact: Artifact, asked: str, agents: Sequence[str] | None, max_kl: float) -> SharingChoice:
    """The scheme with which an artifact is to be opened.

    Args:
        asked: a sharing scheme, or "auto".
        agents: agents that will act; None: all.
        max_kl: largest drift that counts as no loss, in nats per token of the agent that drifts most.

    Raises:
        RequestError: there is no such scheme.
        ArtifactError: the kept drift is damaged.
    """
    require_sharing(asked)
    manifest = artifact.manifest
    acting = acting_agents(manifest.agents, agents)
    sizes = sizes_of(manifest, acting)
    return choose(asked, acting, sizes, read_kept_drift(artifact), max_kl, str(artifact.directory))


def acting_agents(agents: Sequence[Agent], names: Sequence[str] | None) -> tuple[Agent, ...]:
    """Agents with an adapter that will act; `names` None: all."""
    return tuple(agent for agent in agents if not agent.spare and (names is None or agent.name in names))


def sizes_of(manifest: Manifest, acting: Sequence[Agent]) -> dict[str, tuple[int, ...]]:
    """`bytes_per_token` of an artifact; it has the schemes that can run."""
    schemas = {layout: entry.schema for layout, entry in manifest.layouts.items()}
    return sizes_of_schemas(schemas, acting, dtype_named(manifest.dtype))


def sizes_of_schemas(
    schemas: Mapping[str, CacheSchema], acting: Sequence[Agent], dtype: torch.dtype
) -> dict[str, tuple[int, ...]]:
    """`bytes_per_token` of cache schemas by layout."""
    return bytes_per_token(schemas, tuple(agent.name for agent in acting), dtype_name(dtype))


def layout_of_auto(agents: Sequence[Agent]) -> Layout:
    """The layout of the scheme that "auto" gives before any drift was measured."""
    tuned = tuned_scheme([agent for agent in agents if not agent.spare])
    return SCHEMES[tuned if tuned in SCHEMES else EXACT].layout


def choose(
    asked: str,
    acting: Sequence[Agent],
    sizes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, SchemeDrift],
    max_kl: float,
    source: str,
) -> SharingChoice:
    """The scheme asked for, or for "auto" the first of: tuned for, measured, `non_shared`.

    Args:
        acting: agents that will act, without `base`.
        sizes: result of `bytes_per_token`.
        kept: measured drift by scheme.
        source: the artifact, for messages; "" if there is none.

    Raises:
        RequestError: `max_kl` is not above 0.
    """
    require_max_kl(max_kl)
    names = tuple(agent.name for agent in acting)
    tuned = tuned_scheme(acting)
    within = cheapest_within(kept.values(), sizes, max_kl, names)
    if asked == AUTO and tuned in sizes:
        asked = tuned
    elif asked == AUTO and within is not None:
        asked = within.scheme
    elif asked == AUTO:
        return SharingChoice(EXACT, "exact", (*_tuned_elsewhere(EXACT, acting), *_savings(sizes, kept, source)))
    notes = _tuned_elsewhere(asked, acting)
    if asked == EXACT:
        return SharingChoice(asked, "exact", notes)
    drift = kept.get(asked)
    measured = drift is not None and drift.covers(names)
    if measured and drift is not None and drift.worst()[1] > max_kl:
        agent, kl = drift.worst()
        notes = (*notes, f"the measured drift of {asked} is {kl:.2g} nats a token ({agent}), above {max_kl:g}")
        measured = False
    return SharingChoice(asked, "tuned" if tuned == asked else "measured" if measured else "none", notes)


def _tuned_elsewhere(scheme: str, acting: Sequence[Agent]) -> tuple[str, ...]:
    """A warning if adapters run under another scheme than the one they were tuned for."""
    others = [f"{agent.name} for {agent.tuned_for}" for agent in acting if agent.tuned_for not in ("", scheme)]
    if not others:
        return ()
    return (f"adapters were tuned for another sharing scheme than {scheme} and may answer worse: {', '.join(others)}",)


def _savings(sizes: Mapping[str, tuple[int, ...]], kept: Mapping[str, SchemeDrift], source: str) -> tuple[str, ...]:
    """A line on what sharing would save, and how to get it; nothing if it would save no cache."""
    shared, alone = sizes.get(SUGGESTED), sizes[EXACT]
    if shared is None or shared[-1] >= alone[-1]:
        return ()
    saves = (
        f"under {SUGGESTED} a token would take {shared[-1]} bytes of cache instead of {alone[-1]}, once all "
        f"{len(alone)} agents have seen it"
    )
    how = f"`lragent verify {source or 'ARTIFACT'} --trajectories RESULTS.jsonl` measures it"
    drift = kept.get(SUGGESTED)
    if drift is not None:
        agent, kl = drift.worst()
        return (f"sharing is {EXACT}: {saves}, but drift was measured as {kl:.2g} nats a token ({agent}). {_TUNE}",)
    return (f"sharing is {EXACT}, as nothing is known of these adapters under a shared cache: {saves}. {how}; {_TUNE}",)
