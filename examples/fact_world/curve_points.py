"""Points of the curve, and the measurement of points on one trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.fact_world.format import ROLES
from lragent.capture.capture import capture
from lragent.loading.model import load_directories
from lragent.passes.pipeline import transform
from lragent.program.cache_schema import CacheSchema
from lragent.program.dtypes import dtype_name
from lragent.runtime.cache_cost import bytes_per_token
from lragent.runtime.schemes import EXACT, SCHEMES
from lragent.training.early_deviation import LAYER, Deviation, own_forward
from lragent.training.refresh import Refreshed, most_recent, refreshed_rows
from lragent.training.rows import Rows
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.token_figures import compared
from lragent.training.turn_sequence import TurnSequence

REFRESH = "refresh"
RULES = ("deviation", "recent")


@dataclass(frozen=True)
class Point:
    """A sharing scheme or, if `sharing` is `REFRESH`, a share of the tokens that is recomputed by a rule."""

    sharing: str
    rule: str = ""
    share: float = 0.0

    @property
    def name(self) -> str:
        return self.sharing if self.sharing != REFRESH else f"{100 * self.share:g}% recomputed, {self.rule}"


@dataclass(frozen=True)
class AgentSums:
    """Sums over one agent's generated tokens and turns: KL in nats, tokens with the teacher's most likely token, turns
    in which every token is the most likely one."""

    tokens: int = 0
    kl: float = 0.0
    same: int = 0
    turns: int = 0
    right: int = 0

    @property
    def mean_kl(self) -> float:
        return self.kl / self.tokens

    def plus(self, other: AgentSums) -> AgentSums:
        return AgentSums(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Sums:
    """A point on one or more trajectories.

    Args:
        computed: tokens that ran through the model; of a token that ran through some layers, that part.
        candidates, recomputed: see `lragent.training.refresh.Refreshed`; 0 for a scheme.
    """

    computed: float
    candidates: int
    recomputed: int
    agents: dict[str, AgentSums]

    def plus(self, other: Sums) -> Sums:
        agents = {
            name: self.agents.get(name, AgentSums()).plus(other.agents.get(name, AgentSums()))
            for name in {**self.agents, **other.agents}
        }
        return Sums(
            self.computed + other.computed,
            self.candidates + other.candidates,
            self.recomputed + other.recomputed,
            agents,
        )

    @property
    def total(self) -> AgentSums:
        """All agents together."""
        total = AgentSums()
        for sums in self.agents.values():
            total = total.plus(sums)
        return total


@dataclass(frozen=True)
class AdapterSet:
    """An adapter set on the model, without gradients.

    Args:
        schema: of the split cache.
        digests: agent -> digest of its adapter.
    """

    name: str
    model: SharedModel
    schema: CacheSchema
    digests: dict[str, str]
    dtype: str
    vocab_size: int
    max_positions: int

    def bytes_per_token(self, sums: Sums, point: Point) -> float:
        """Bytes of cache of a token that all agents have seen; recomputed tokens have K/V of the agent's own."""
        dense = CacheSchema("dense", self.schema.agents, self.schema.base, ())
        sizes = bytes_per_token({"split": self.schema, "dense": dense}, self.schema.agents, self.dtype)
        if point.sharing != REFRESH:
            return sizes[point.sharing][-1]
        share = sums.recomputed / sums.candidates if sums.candidates else 0.0
        return sizes["base_lr_shared"][-1] + share * (len(self.schema.agents) - 1) * sizes["full_shared"][-1]


def open_set(name: str, model_dir: Path, folder: Path, dtype: str) -> AdapterSet:
    """Loads the adapters `folder/ROLE` and builds their forward."""
    loaded = load_directories(model_dir, {role: folder / role for role in ROLES}, dtype)
    split = transform(capture(loaded), "split")
    digests = {agent.name: agent.digest for agent in loaded.agents}
    model = SharedModel(split.graph, split.schema)
    return AdapterSet(
        name, model, split.schema, digests, dtype_name(loaded.dtype), loaded.vocab_size, loaded.max_positions
    )


def points_of(shares: Sequence[float], rules: Sequence[str]) -> list[Point]:
    """Every scheme, and the selective recomputes."""
    return [*map(Point, SCHEMES), *(Point(REFRESH, rule, share) for rule in rules for share in shares)]


def measure_points(
    measured: AdapterSet, teacher_RV: Tensor, sequence: TurnSequence, points: Sequence[Point]
) -> Iterator[tuple[Point, Sums]]:
    """Runs one trajectory once for each point.

    Args:
        teacher_RV: log-probabilities of the teacher for the generated tokens.
    """
    model = measured.model
    with torch.no_grad():
        own_RD, own_rows, deviation = own_forward(model, sequence)
        for point in points:
            if point.sharing == EXACT:
                rows, hidden_RD, refreshed = own_rows, own_RD, None
            else:
                rows, refreshed = _rows(point, sequence, model.agents, deviation)
                hidden_RD = model.hidden(rows)
            found_RV = model.logits(hidden_RD, rows.target_agents_R).float().log_softmax(-1)
            agents = _by_agent(rows, teacher_RV, found_RV, model.agents)
            layers = len(measured.schema.base)
            yield point, _sums(point, rows, refreshed, agents, layers)


def log_probabilities(teacher: AdapterSet, sequence: TurnSequence) -> Tensor:
    """Float32 `[R, V]` of the generated tokens under `non_shared`."""
    with torch.no_grad():
        rows = rows_of(EXACT, [sequence], teacher.model.agents)
        logits_RV: Tensor = teacher.model(rows)
        return logits_RV.float().log_softmax(-1)


def _rows(
    point: Point, sequence: TurnSequence, agents: Sequence[str], deviation: Deviation
) -> tuple[Rows, Refreshed | None]:
    if point.sharing != REFRESH:
        return rows_of(point.sharing, [sequence], agents), None
    score = deviation if point.rule == "deviation" else most_recent
    refreshed = refreshed_rows(sequence, agents, point.share, score)
    return refreshed.rows, refreshed


def _sums(point: Point, rows: Rows, refreshed: Refreshed | None, agents: dict[str, AgentSums], layers: int) -> Sums:
    computed = float(len(rows.token_ids_N))
    if refreshed is None:
        return Sums(computed, 0, 0, agents)
    if point.rule == "deviation":  # the first layers run all candidates, to find those of the largest deviation
        computed += (refreshed.candidates - refreshed.recomputed) * LAYER / layers
    return Sums(computed, refreshed.candidates, refreshed.recomputed, agents)


def _by_agent(rows: Rows, teacher_RV: Tensor, found_RV: Tensor, agents: Sequence[str]) -> dict[str, AgentSums]:
    figures = compared(teacher_RV, found_RV, rows.targets_R)
    kl_R = figures.kl_R.double()
    sums: dict[str, AgentSums] = {}
    for turn in rows.turns_R.unique():
        mine_R = rows.turns_R == turn
        agent = int(rows.target_agents_R[mine_R][0])
        name = ("base", *agents)[agent]
        one = AgentSums(
            tokens=int(mine_R.sum()),
            kl=float(kl_R[mine_R].sum()),
            same=int(figures.same_R[mine_R].sum()),
            turns=1,
            right=int(figures.right_R[mine_R].all()),
        )
        sums[name] = sums.get(name, AgentSums()).plus(one)
    return sums
