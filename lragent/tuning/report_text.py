"""Texts of a tuning report, for the command line and for its page."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lragent.tuning.measure import Agreement
    from lragent.tuning.report import TuneReport

COLUMNS = ("sharing", "agent", "tokens", "KL a token", "same top token", "turns all right")


def change_rows(report: TuneReport) -> list[tuple[str, ...]]:
    """One row of `COLUMNS` for each scheme and agent, with figures before and after."""
    return [
        (scheme, agent, str(before.tokens), *_changes(before, report.after[scheme][agent]))
        for scheme, rows in report.before.items()
        for agent, before in rows.items()
    ]


def measured_on(report: TuneReport) -> str:
    """The trajectories behind the figures."""
    kind = "held-out trajectories" if report.held_out else "trajectories that it learned from"
    return f"{report.measured} {kind}"


def convert_command(report: TuneReport, artifact: str = "NAME.lragent") -> str:
    """The command that makes an artifact of the tuned adapters."""
    model = "MODEL" if report.given is None else shlex.quote(report.given.model)
    tuned = ",".join(f"{agent}={report.out / agent}" for agent in report.agents)
    return f"lragent convert {model} --adapters {shlex.quote(tuned)} -o {artifact}"


def _changes(before: Agreement, after: Agreement) -> tuple[str, str, str]:
    return (
        f"{before.kl:.4f} -> {after.kl:.4f}",
        f"{before.top1:.1%} -> {after.top1:.1%}",
        f"{before.turn_accuracy:.0%} -> {after.turn_accuracy:.0%} of {before.turns}",
    )
