"""Selective recompute over the cache of `base_lr_shared`: rows for a measurement, not a sharing scheme of the engine.

When an agent's turn begins, it runs a share of the tokens that others have written since its last turn, and keeps
their K and V for itself. It reads those, and the writer's of all other tokens.

| share | rows |
|---|---|
| 0 | `base_lr_shared` |
| between | `base_lr_shared`, and each agent's rows of the tokens that it recomputes |
| 1 | `non_shared` |

The rule that chooses the tokens is a score. `most_recent` takes those nearest to the turn;
`lragent.training.early_deviation` takes those whose V is farthest from the agent's own in an early layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lragent.errors import RequestError
from lragent.training.rows import Rows
from lragent.training.rows_builder import RowsBuilder
from lragent.training.turn_sequence import TurnSequence, acting_turns

# Agent id and position -> score; tokens with the largest are recomputed, of equal ones the later.
Score = Callable[[int, int], float]


@dataclass(frozen=True)
class Refreshed:
    """Rows under a selective recompute.

    Args:
        candidates: tokens of other writers that agents find when their turns begin, each counted once an agent.
        recomputed: those of them that the agents run themselves.
    """

    rows: Rows
    candidates: int
    recomputed: int


def refreshed_rows(sequence: TurnSequence, agents: Sequence[str], share: float, score: Score) -> Refreshed:
    """The rows of one sequence.

    Args:
        agents: names in order; agent id = index + 1.
        share: of the tokens that other agents wrote since the acting agent's last turn, rounded in each turn.

    Raises:
        RequestError: the share is not from 0 to 1, there is no turn, or a turn is not valid.
    """
    if not 0 <= share <= 1:
        raise RequestError(f"a share of {share} of the tokens is to be recomputed, must be from 0 to 1")
    builder = RowsBuilder()
    written: list[int] = []
    read: dict[int, list[int]] = {}  # by agent, the row that it reads at each position
    candidates = recomputed = 0
    for acting in acting_turns(sequence, tuple(agents)):
        reads = read.setdefault(acting.agent, [])
        found = range(len(reads), acting.processed)
        chosen = _largest(found, share, partial(score, acting.agent))
        own = dict(zip(chosen, builder.add(sequence, chosen, acting.agent), strict=True))
        reads += [own.get(position, written[position]) for position in found]
        new = builder.add(sequence, range(acting.processed, acting.end), acting.agent)
        written += new
        reads += new
        builder.want(sequence, acting, reads[acting.wanted.start : acting.wanted.stop])
        candidates += len(found)
        recomputed += len(chosen)
    if not builder.logits:
        raise RequestError("the sequence has no turn", "Give trajectories in which agents generated tokens.")
    for agent, reads in read.items():
        builder.read(agent, [row for row in reads if builder.agents[row] == agent], reads, reads)
    return Refreshed(builder.rows(whole=False), candidates, recomputed)


def _largest(positions: Sequence[int], share: float, score: Callable[[int], float]) -> list[int]:
    """The share of positions with the largest score, in order."""
    ranked = sorted(positions, key=lambda position: (score(position), position), reverse=True)
    return sorted(ranked[: round(share * len(positions))])


def most_recent(agent: int, position: int) -> float:
    """The score of the rule that takes the tokens nearest to the turn."""
    return float(position)
