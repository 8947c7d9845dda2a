"""The HTML page of a `DriftReport`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lragent.program.drift import SchemeDrift, Tally
from lragent.reports.drift_report import DriftReport
from lragent.reports.html.dot_chart import dot_chart
from lragent.reports.html.line_chart import line_chart
from lragent.reports.html.markup import Markup
from lragent.reports.html.page import Section, bullets, page, paragraph, verdict
from lragent.reports.html.series import Series
from lragent.reports.html.table import table
from lragent.reports.tally_text import show_tally
from lragent.training.stream_distances import StreamDistance

KL_AXIS = "KL(non_shared || scheme), nats per token"


def drift_page(report: DriftReport) -> str:
    """Source of a self-contained page."""
    found = report.drift
    schemes = found.schemes
    chosen = report.recommendation
    subtitle = f"{found.sequences} trajectories, {found.tokens} generated tokens, teacher-forced against non_shared"
    chosen_rows = [number for number, drift in enumerate(schemes) if drift.scheme == chosen.scheme]
    overview = [
        verdict(f"Recommended: {chosen.reason}."),
        dot_chart(
            "KL by scheme, one dot for each agent",
            [drift.scheme for drift in schemes],
            _by_agent(schemes),
            KL_AXIS,
            report.max_kl,
        ),
        table(
            ["sharing", "cache a token", "KL a token", "top-1", "largest KL", "of agent"],
            [_row(drift, report.bytes_per_token) for drift in schemes],
            "Mean over all generated tokens, and the agent that drifts most",
            chosen_rows,
        ),
        _groups_table("KL a token (top-1, tokens), by agent", {d.scheme: d.by_agent for d in schemes}),
    ]
    sections = [
        Section("Drift by scheme", overview),
        _binned(
            "By distance since the last agent switch",
            "tokens since another agent's last turn ended",
            {drift.scheme: drift.by_distance for drift in schemes},
            report.max_kl,
        ),
        _binned(
            "By context length",
            "tokens before the generated token",
            {drift.scheme: drift.by_context for drift in schemes},
            report.max_kl,
        ),
        *_streams(report.streams),
        Section("Adapters", [bullets(_adapters(report))]),
        *([Section("Notes", [bullets(report.notes)])] if report.notes else []),
        Section("How to read this", _help(report)),
    ]
    return page(f"Sharing drift of {report.artifact}", subtitle, sections)


def _row(drift: SchemeDrift, sizes: Mapping[str, int]) -> list[str]:
    agent, kl = drift.worst()
    size = f"{sizes[drift.scheme]} bytes" if drift.scheme in sizes else "can't run"
    return [drift.scheme, size, f"{drift.total.mean_kl:.2g}", f"{drift.total.agreement:.1%}", f"{kl:.2g}", agent]


def _by_agent(schemes: Sequence[SchemeDrift]) -> list[Series]:
    agents = list(dict.fromkeys(agent for drift in schemes for agent in drift.by_agent))
    return [
        Series(agent, {d.scheme: d.by_agent[agent].mean_kl for d in schemes if agent in d.by_agent}) for agent in agents
    ]


def _binned(heading: str, axis: str, tallies: Mapping[str, Mapping[str, Tally]], limit: float) -> Section:
    columns = list(next(iter(tallies.values())))
    series = [Series(scheme, {name: tally.mean_kl for name, tally in bins.items()}) for scheme, bins in tallies.items()]
    chart = line_chart(f"KL {heading[0].lower()}{heading[1:]}, nats per token", columns, series, axis, limit)
    return Section(heading, [chart, _groups_table("KL a token (top-1, tokens)", tallies)])


def _groups_table(caption: str, tallies: Mapping[str, Mapping[str, Tally]]) -> Markup:
    columns = list(next(iter(tallies.values())))
    rows = [[scheme, *(show_tally(groups[column]) for column in columns)] for scheme, groups in tallies.items()]
    return table(["sharing", *columns], rows, caption)


def _streams(streams: Sequence[StreamDistance]) -> list[Section]:
    """The measures that explain drift; nothing with one agent."""
    if not streams:
        return []
    rows = [
        [
            f"{pair.writer} to {pair.reader}",
            pair.side,
            *("-" if value is None else f"{value:.2f}" for value in (pair.rho, pair.cos)),
            {None: "-", True: "without adapter", False: "the writer's"}[pair.neutral_is_nearer],
            *("-" if value is None else f"{value:.0%}" for value in (pair.low_rank, pair.whole)),
        ]
        for pair in streams
    ]
    columns = ["writer to reader", "side", "rho", "cos", "nearer base", "error, low-rank", "error, whole"]
    text = (
        "Each agent runs the same tokens. rho and cos compare how far writer and reader move the base stream away "
        "from the one without adapter, and in which direction; the latter is nearer to the reader's own stream if rho "
        "is at least 2 cos. The errors are relative to the reader's own adapter part: what it finds in low-rank "
        "streams of the writer (base_lr_shared), and in the writer's whole K and V (full_shared)."
    )
    return [Section("Why: streams of the agents", [paragraph(text), table(columns, rows, names=2)])]


def _adapters(report: DriftReport) -> list[str]:
    return [
        f"{name}: sha256 {digest[:12]}, "
        + (f"tuned for {report.tuned_for[name]}" if name in report.tuned_for else "not tuned for a shared cache")
        for name, digest in report.agents.items()
    ]


def _help(report: DriftReport) -> list[Markup]:
    return [
        paragraph(
            "Under non_shared every agent computes its own cache, as PEFT does. For each generated token the "
            "distribution of the next token under a scheme is compared with the one under non_shared, on the same "
            "tokens. KL is 0 if nothing changed; top-1 is the share of tokens at which both have the same most likely "
            "token."
        ),
        paragraph(
            f"A mean can hide a role with few tokens, so the limit of {report.max_kl:g} applies to the agent that "
            "drifts most. At 0.2 nats a token measured sets of adapters lost all of their tasks, at 0.005 none. Drift "
            "is not accuracy: compare results of rollouts where it matters."
        ),
    ]
