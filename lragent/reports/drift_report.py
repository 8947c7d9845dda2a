"""The drift of an artifact's sharing schemes on given trajectories, and the scheme that follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lragent.artifact.directory import Artifact
from lragent.artifact.kept_drift import digests, keep_drift
from lragent.artifact.sharing_choice import sizes_of
from lragent.errors import ArtifactError
from lragent.loading.stages import Progress
from lragent.program.drift import SchemeDrift
from lragent.runtime.cheapest_scheme import by_cost, cheapest_within, require_max_kl
from lragent.runtime.schemes import EXACT, scheme_named
from lragent.training.drift import SHARED, Drift, measure_drift
from lragent.training.open_model import shared_model_of_artifact
from lragent.training.stream_distances import StreamDistance, stream_distances
from lragent.training.turn_sequence import TurnSequence


@dataclass(frozen=True)
class Recommendation:
    """A sharing scheme and the sentence that says why."""

    scheme: str
    reason: str


@dataclass(frozen=True)
class DriftReport:
    """Drift of an artifact's schemes.

    Args:
        artifact: its path.
        agents: agent -> digest of its adapter.
        tuned_for: agent -> scheme that its adapter was tuned for; agents without one are left out.
        bytes_per_token: scheme -> bytes of cache of a token that all agents have seen.
        max_kl: nats per token that count as no loss.
        streams: measures that explain the drift; empty with fewer than two agents.
        notes: sentences about the trajectories, such as what was skipped.
    """

    artifact: str
    agents: Mapping[str, str]
    tuned_for: Mapping[str, str]
    drift: Drift
    bytes_per_token: Mapping[str, int]
    max_kl: float
    recommendation: Recommendation
    streams: tuple[StreamDistance, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact,
            "agents": dict(self.agents),
            "tuned_for": dict(self.tuned_for),
            "max_kl": self.max_kl,
            "recommendation": self.recommendation.scheme,
            "reason": self.recommendation.reason,
            "bytes_per_token": dict(self.bytes_per_token),
            "notes": list(self.notes),
            **self.drift.to_dict(),
            "streams": [
                {**dataclasses.asdict(pair), "neutral_is_nearer": pair.neutral_is_nearer} for pair in self.streams
            ],
        }


def drift_report(
    artifact: Artifact,
    sequences: Sequence[TurnSequence],
    max_kl: float,
    schemes: Sequence[str] = SHARED,
    notes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> DriftReport:
    """Measures the drift and keeps it in the artifact (`lragent.artifact.kept_drift`).

    Raises:
        RequestError: an unknown scheme, or nothing to measure.
        SplitRefused: the model can't be split, so no scheme but `non_shared` and `full_shared` can run.
        ArtifactError: the artifact is damaged. A drift that can't be kept is a note in the report.
    """
    for name in schemes:
        scheme_named(name)
    require_max_kl(max_kl)
    if progress is not None:
        progress("opening the model")
    model = shared_model_of_artifact(artifact)
    found = measure_drift(model, sequences, schemes, progress)
    try:
        keep_drift(artifact, found.schemes)
    except ArtifactError as error:  # the report is worth more than its copy
        notes = (*notes, f"the drift is not kept in the artifact: {error.message}")
    if progress is not None:
        progress("comparing streams")
    acting = tuple(agent for agent in artifact.manifest.agents if not agent.spare)
    sizes = sizes_of(artifact.manifest, acting)
    return DriftReport(
        artifact=str(artifact.directory),
        agents=digests(artifact.manifest),
        tuned_for={agent.name: agent.tuned_for for agent in acting if agent.tuned_for},
        drift=found,
        bytes_per_token={name: held[-1] for name, held in sizes.items()},
        max_kl=max_kl,
        recommendation=recommend(found.schemes, sizes, max_kl, tuple(agent.name for agent in acting)),
        streams=stream_distances(model, sequences),
        notes=notes,
    )


def recommend(
    found: Sequence[SchemeDrift], sizes: Mapping[str, tuple[int, ...]], max_kl: float, agents: Sequence[str]
) -> Recommendation:
    """The cheapest scheme under which no agent drifts by more than `max_kl`, else `non_shared`.

    Args:
        sizes: result of `lragent.runtime.cache_cost.bytes_per_token`.
        agents: agents that act; each must have tokens in the measured trajectories.
    """
    alone = sizes[EXACT][-1]
    unseen = [agent for agent in agents if not found[0].covers([agent])]
    if unseen:
        return Recommendation(
            EXACT, f"{EXACT}: the trajectories have no turn of {', '.join(unseen)}, so nothing is known of them"
        )
    chosen = cheapest_within(found, sizes, max_kl, agents)
    if chosen is not None:
        agent, kl = chosen.worst()
        return Recommendation(
            chosen.scheme,
            f"{chosen.scheme} is the cheapest scheme under which no agent drifts by more than {max_kl:g} nats a token "
            f"({agent} drifts most, by {kl:.2g}); a token takes {sizes[chosen.scheme][-1]} bytes of cache instead of "
            f"{alone}",
        )
    runnable = [drift for drift in found if drift.scheme in sizes]
    if not runnable:
        return Recommendation(EXACT, f"{EXACT}: no measured scheme can run on this artifact")
    nearest = min(runnable, key=lambda drift: (drift.worst()[1], by_cost(sizes).index(drift.scheme)))
    agent, kl = nearest.worst()
    return Recommendation(
        EXACT,
        f"{EXACT}: under every other scheme some agent drifts by more than {max_kl:g} nats a token; the nearest is "
        f"{nearest.scheme} with {kl:.2g} ({agent}). `lragent tune` trains the adapters for a scheme",
    )
