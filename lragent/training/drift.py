"""Measures the drift of sharing schemes against `non_shared`: KL per token and agreement of the most likely token.

The figures of each token are those of `lragent.training.token_figures`, with the agent under `non_shared` as teacher:
they say what the cache changes. Legend: R = generated tokens of a sequence, D = hidden size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lragent.errors import ModelError, RequestError
from lragent.loading.stages import Progress
from lragent.program.drift import SchemeDrift, Tally
from lragent.runtime.schemes import EXACT, SCHEMES
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.token_figures import token_figures
from lragent.training.turn_sequence import TurnSequence

SHARED = tuple(name for name in SCHEMES if name != EXACT)

DISTANCES = (16, 64, 256, 1024)  # first distance of each bin but the first
CONTEXTS = (128, 512, 2048, 8192)
NO_SWITCH = "no switch"  # tokens before which no other agent has had a turn


@dataclass(frozen=True)
class Drift:
    """Drift of several schemes on the same sequences.

    Args:
        sequences: number of sequences.
    """

    sequences: int
    schemes: tuple[SchemeDrift, ...]

    @property
    def tokens(self) -> int:
        """Generated tokens that were compared."""
        return self.schemes[0].total.tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "schemes": [found.to_dict() for found in self.schemes],
        }


@dataclass(frozen=True)
class Groups:
    """The groups of one generated token."""

    agent: str
    distance: str
    context: str


def measure_drift(
    model: SharedModel,
    sequences: Sequence[TurnSequence],
    schemes: Sequence[str] = SHARED,
    progress: Progress | None = None,
) -> Drift:
    """Runs each sequence once under `non_shared` and once under each scheme; no gradients.

    Memory holds the hidden states of one sequence under every scheme, and logits of some tokens of two.

    Args:
        schemes: without `non_shared`.
        progress: called with "trajectory 3 of 8" when each begins.

    Raises:
        RequestError: there is no sequence or no scheme; a turn names an unknown agent or is out of order.
        ModelError: logits are infinite or NaN.
    """
    if not sequences or not schemes or EXACT in schemes:
        raise RequestError(
            f"drift of {', '.join(schemes) or 'no scheme'} on {len(sequences)} trajectories",
            f"Give at least one trajectory, and at least one scheme other than {EXACT}.",
        )
    total = {scheme: _nothing(scheme, model.agents) for scheme in schemes}
    for number, sequence in enumerate(sequences, start=1):
        if progress is not None:
            progress(f"trajectory {number} of {len(sequences)}")
        for scheme, found in _of_sequence(model, sequence, schemes, number).items():
            total[scheme] = total[scheme].plus(found)
    return Drift(len(sequences), tuple(_without_empty(found) for found in total.values()))


def _of_sequence(
    model: SharedModel, sequence: TurnSequence, schemes: Sequence[str], number: int
) -> dict[str, SchemeDrift]:
    groups = list(groups_of(sequence))
    with torch.no_grad():
        rows = rows_of(EXACT, [sequence], model.agents)
        teacher_RD = model.hidden(rows)
        students_RD = [model.hidden(rows_of(scheme, [sequence], model.agents)) for scheme in schemes]
    found = token_figures(model.logits, teacher_RD, students_RD, rows.target_agents_R, rows.targets_R)
    drifts = {}
    for scheme, figures in zip(schemes, found, strict=True):
        if not bool(figures.kl_R.isfinite().all()):
            raise ModelError(
                f"trajectory {number}: logits under {EXACT} or {scheme} are infinite or NaN",
                "Convert the model in another dtype, or leave the trajectory out.",
            )
        drifts[scheme] = _grouped(scheme, groups, figures.kl_R.tolist(), figures.same_R.tolist())
    return drifts


def groups_of(sequence: TurnSequence) -> Iterator[Groups]:
    """The groups of every generated token, turn by turn.

    The distance is the number of tokens since the end of the last turn of another agent: from there on the acting
    agent has written the cache itself.
    """
    switched: int | None = None  # end of the last turn of another agent
    before: tuple[str, int] | None = None  # agent and end of the turn before
    for turn in sequence.turns:
        if before is not None and before[0] != turn.agent:
            switched = before[1]
        for position in range(turn.start, turn.end):
            distance = NO_SWITCH if switched is None else bin_of(position - switched, DISTANCES)
            yield Groups(turn.agent, distance, bin_of(position, CONTEXTS))
        before = turn.agent, turn.end


def bin_of(value: int, firsts: Sequence[int]) -> str:
    """Name of the bin of a number: "0-15", "16-63", ..., "1024+"."""
    return _bins(firsts)[bisect_right(firsts, value)]


def _bins(firsts: Sequence[int]) -> tuple[str, ...]:
    bounds = (0, *firsts)
    return (*(f"{low}-{high - 1}" for low, high in zip(bounds, firsts, strict=False)), f"{firsts[-1]}+")


def _nothing(scheme: str, agents: Sequence[str]) -> SchemeDrift:
    """Empty groups, in the order in which reports show them."""
    return SchemeDrift(
        scheme,
        Tally(),
        dict.fromkeys(agents, Tally()),
        dict.fromkeys((NO_SWITCH, *_bins(DISTANCES)), Tally()),
        dict.fromkeys(_bins(CONTEXTS), Tally()),
    )


def _grouped(scheme: str, groups: Sequence[Groups], kl: Sequence[float], same: Sequence[bool]) -> SchemeDrift:
    total = Tally()
    kinds: dict[str, dict[str, Tally]] = {"agent": {}, "distance": {}, "context": {}}
    for group, token_kl, token_same in zip(groups, kl, same, strict=True):
        one = Tally(1, token_kl, int(token_same))
        total = total.plus(one)
        for kind, tallies in kinds.items():
            name = getattr(group, kind)
            tallies[name] = tallies.get(name, Tally()).plus(one)
    return SchemeDrift(scheme, total, kinds["agent"], kinds["distance"], kinds["context"])


def _without_empty(found: SchemeDrift) -> SchemeDrift:
    def filled(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
        return {name: tally for name, tally in tallies.items() if tally.tokens}

    return SchemeDrift(
        found.scheme,
        found.total,
        filled(found.by_agent),
        filled(found.by_distance),
        filled(found.by_context),
    )
