"""The distance of what an agent reads from what it would have computed, in an early layer.

A selective recompute (`lragent.training.refresh`) can take the tokens of the largest distance. The distance is
|x_i W + x_i A_j B_j - (x_j W + x_j A_j B_j)|^2 of V, for a token of writer i and a reader j, in the second layer: the
first one that differs under `base_lr_shared`. Up to there the reads are exact whatever is recomputed, so that one
forward under `non_shared` gives the distances of all turns. To find them, an engine would run all candidates through
`LAYER` layers.

Legend: N = rows, L = positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.errors import RequestError
from lragent.runtime.schemes import EXACT
from lragent.training.lower_to_rows import LayerStreams
from lragent.training.rows import Rows
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import TurnSequence, acting_turns

LAYER = 1


@dataclass(frozen=True)
class Deviation:
    """Squared distances of one sequence; as a function, a score for `refreshed_rows`.

    Args:
        by_agent: agent id -> distance at each position, up to the agent's last turn.
    """

    by_agent: Mapping[int, Sequence[float]]

    def __call__(self, agent: int, position: int) -> float:
        return self.by_agent[agent][position]


def own_forward(model: SharedModel, sequence: TurnSequence) -> tuple[Tensor, Rows, Deviation]:
    """A forward under `non_shared`: last hidden states of the wanted rows, the rows, and the deviation.

    Raises:
        RequestError: the model has too few layers, or a turn is not valid.
    """
    rows = rows_of(EXACT, [sequence], model.agents)
    found: dict[int, Sequence[float]] = {}

    def observe(streams: LayerStreams) -> None:
        if streams.layer == LAYER:
            found.update(_distances(streams, rows, _writers(sequence, model.agents)))

    hidden_RD = model.hidden(rows, observe)
    if not found:
        raise RequestError(
            f"the model has no layer {LAYER} whose K and V could differ between agents",
            "Choose the tokens to recompute by another rule.",
        )
    return hidden_RD, rows, Deviation(found)


def _writers(sequence: TurnSequence, agents: Sequence[str]) -> list[int]:
    """The agent id that processes each position first."""
    turns = acting_turns(sequence, tuple(agents))
    return [acting.agent for acting in turns for _ in range(acting.processed, acting.end)]


def _distances(streams: LayerStreams, rows: Rows, writers_L: Sequence[int]) -> dict[int, list[float]]:
    """Distances by reading agent.

    Args:
        rows: those of `non_shared`, of one sequence: one read an agent.
    """
    own = {read.agent: read.base_L for read in rows.reads}
    found: dict[int, list[float]] = {}
    for agent, own_L in own.items():
        writer_L = torch.stack([own[writer][position] for position, writer in enumerate(writers_L[: len(own_L)])])
        apart_LHD = _value(streams, own_L, agent) - _value(streams, writer_L, agent)
        found[agent] = apart_LHD.square().flatten(1).sum(1).tolist()
    return found


def _value(streams: LayerStreams, rows_L: Tensor, agent: int) -> Tensor:
    """V that an agent reads in given rows: float32 `[L, H, Dv]`."""
    base_LHD = streams.value_NHDv[rows_L].float()
    delta_LHD = None if streams.low_rank_v is None else streams.low_rank_v.delta(rows_L, agent)
    return base_LHD if delta_LHD is None else base_LHD + delta_LHD.float()
