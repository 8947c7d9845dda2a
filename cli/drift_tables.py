"""Tables of a drift report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .quantities import show_bytes

if TYPE_CHECKING:
    from lragent.program.drift import Tally
    from lragent.reports.drift_report import DriftReport
    from lragent.training.stream_distances import StreamDistance


def print_drift(report: DriftReport, console: Console) -> None:
    """Prints drift by scheme, agent, distance and context, notes, and the recommendation."""
    schemes = report.drift.schemes
    console.print(scheme_table(report))
    for title, tallies in (
        ("by tokens since another agent's last turn ended", {one.scheme: one.by_distance for one in schemes}),
        ("by tokens of context", {one.scheme: one.by_context for one in schemes}),
    ):
        console.print(group_table(title, tallies))
    if (streams := streams_line(report.streams)) != "":
        console.print(streams, markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"recommended: {report.recommendation.reason}", markup=False, soft_wrap=True)


def streams_line(streams: Sequence[StreamDistance]) -> str:
    """Ranges of the measures that explain drift; the page and --json have them by pair. "" without pairs."""
    parts = []
    for name, values in (
        ("low-rank part that a reader finds is off by", [pair.low_rank for pair in streams]),
        ("whole K or V by", [pair.whole for pair in streams]),
    ):
        known = [value for value in values if value is not None]
        if known:
            parts.append(f"{name} {min(known):.0%} to {max(known):.0%}")
    nearer = [pair.neutral_is_nearer for pair in streams if pair.neutral_is_nearer is not None]
    if nearer:
        parts.append(
            f"a base stream without adapter is nearer than the writer's in {sum(nearer)} of {len(nearer)} cases"
        )
    return f"streams of {len(streams)} pairs of agents and sides: {'; '.join(parts)}" if parts else ""


def scheme_table(report: DriftReport) -> Table:
    """One row for each scheme; a column for each agent."""
    found = report.drift
    table = Table(
        title=f"drift from non_shared on {found.sequences} trajectories, {found.tokens} generated tokens: KL in nats a "
        "token (top-1)",
        title_justify="left",
    )
    agents = list(dict.fromkeys(agent for one in found.schemes for agent in one.by_agent))
    table.add_column("sharing", no_wrap=True)
    for column in ("cache a token", "all", *agents):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found.schemes:
        size = report.bytes_per_token.get(one.scheme)
        cells = [show_drift(one.by_agent[agent]) if agent in one.by_agent else "-" for agent in agents]
        table.add_row(one.scheme, "can't run" if size is None else show_bytes(size), show_drift(one.total), *cells)
    return table


def group_table(title: str, tallies: Mapping[str, Mapping[str, Tally]]) -> Table:
    """One row for each scheme, one column for each bin, and a row with the number of tokens in each."""
    bins = next(iter(tallies.values()))
    table = Table(title=title, title_justify="left")
    table.add_column("sharing", no_wrap=True)
    for column in bins:
        table.add_column(column, justify="right", no_wrap=True)
    for scheme, groups in tallies.items():
        table.add_row(scheme, *(show_drift(tally) for tally in groups.values()))
    table.add_row("tokens", *(str(tally.tokens) for tally in bins.values()))
    return table


def show_drift(tally: Tally) -> str:
    return f"{tally.mean_kl:.2g} ({tally.agreement:.1%})"
