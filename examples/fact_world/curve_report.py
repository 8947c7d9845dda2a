"""The curve as rows: cost and loss of each point, and the share of the gap that it recovers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.fact_world.curve_points import AgentSums, Point, Sums
from lragent.reports.html.page import Section, page, paragraph
from lragent.reports.html.scatter_chart import scatter_chart
from lragent.reports.html.series import Series
from lragent.reports.html.table import table
from lragent.runtime.schemes import EXACT, SCHEMES

COLUMNS = (
    "adapters",
    "sharing",
    "tokens computed, of full_shared's",
    "of non_shared's",
    "cache, bytes a token",
    "KL",
    "largest KL (agent)",
    "top-1",
    "turns all right",
    "gap recovered, KL",
    "gap recovered, turns",
)


@dataclass(frozen=True)
class CurveRow:
    """A point with one adapter set.

    Args:
        to_full, to_non_shared: tokens computed over those of `full_shared` and of `non_shared`.
        bytes_per_token: cache of a token that all agents have seen.
        kl: mean KL(teacher || point) a token, in nats; worst_kl: of the agent `worst_agent`.
        top1: share of tokens with the teacher's most likely token.
        turns_right: share of turns in which every token is the most likely one.
        recovered_kl, recovered_turns: share of the gap, 0: the worst scheme of the teacher's set, 1: its `non_shared`.
        agents: sums of each agent.
    """

    adapters: str
    sharing: str
    to_full: float
    to_non_shared: float
    bytes_per_token: float
    kl: float
    worst_agent: str
    worst_kl: float
    top1: float
    turns_right: float
    recovered_kl: float
    recovered_turns: float
    agents: Mapping[str, AgentSums]

    def cells(self) -> list[str]:
        return [
            self.adapters,
            self.sharing,
            f"{self.to_full:.2f}",
            f"{self.to_non_shared:.2f}",
            f"{self.bytes_per_token:.0f}",
            f"{self.kl:.4f}",
            f"{self.worst_kl:.4f} ({self.worst_agent})",
            f"{self.top1:.1%}",
            f"{self.turns_right:.1%}",
            f"{self.recovered_kl:.2f}",
            f"{self.recovered_turns:.2f}",
        ]


@dataclass(frozen=True)
class Measured:
    """Sums of a point with an adapter set, and its bytes of cache a token."""

    adapters: str
    point: Point
    sums: Sums
    bytes_per_token: float


def curve_rows(measured: Sequence[Measured], computed: Mapping[str, int], teacher: str) -> list[CurveRow]:
    """The rows in the order given.

    Args:
        measured: every scheme of the teacher's set among them.
        computed: tokens that `full_shared` and `non_shared` compute on the same trajectories.
        teacher: name of the set whose `non_shared` and worst scheme are the ends of the gap.
    """
    ends = {one.point.sharing: one.sums.total for one in measured if one.adapters == teacher}
    exact = ends[EXACT]
    most_kl = max(ends[scheme].kl for scheme in SCHEMES)
    fewest_right = min(ends[scheme].right for scheme in SCHEMES)
    rows = []
    for one in measured:
        total = one.sums.total
        worst_kl, worst = max((sums.mean_kl, agent) for agent, sums in one.sums.agents.items())
        rows.append(
            CurveRow(
                adapters=one.adapters,
                sharing=one.point.name,
                to_full=one.sums.computed / computed["full_shared"],
                to_non_shared=one.sums.computed / computed[EXACT],
                bytes_per_token=one.bytes_per_token,
                kl=total.mean_kl,
                worst_agent=worst,
                worst_kl=worst_kl,
                top1=total.same / total.tokens,
                turns_right=total.right / total.turns,
                recovered_kl=_recovered(total.kl, most_kl, exact.kl),
                recovered_turns=_recovered(total.right, fewest_right, exact.right),
                agents=one.sums.agents,
            )
        )
    return rows


def markdown(rows: Sequence[CurveRow]) -> str:
    """A table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def curve_page(rows: Sequence[CurveRow], subtitle: str) -> str:
    """Source of a page: KL of the agent that drifts most over tokens computed, and the table."""
    places = {row.sharing: row.to_full for row in rows}
    names = list(dict.fromkeys(row.adapters for row in rows))
    series = [Series(name, {row.sharing: row.worst_kl for row in rows if row.adapters == name}) for name in names]
    chart = scatter_chart(
        "KL of the agent that drifts most over tokens computed",
        places,
        series,
        "tokens computed, relative to full_shared",
        "KL(teacher || point), nats per token of the agent that drifts most",
    )
    text = paragraph(
        "Each dot is a sharing scheme, or a selective recompute, with one adapter set. Left is cheap, low is near to "
        "the agents' own behaviour."
    )
    parts = [text, chart, table(COLUMNS, [row.cells() for row in rows])]
    return page("Loss of sharing over extra compute", subtitle, [Section("Points", parts)])


def _recovered(value: float, worst: float, exact: float) -> float:
    return 1.0 if worst == exact else (value - worst) / (exact - worst) + 0.0  # no -0
