"""The report of a tuning run: what agents did before and after, under each scheme."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.errors import TuneError
from lragent.files.replace_file import replacing
from lragent.program.defaults import MAX_KL
from lragent.tuning.measure import Agreement
from lragent.tuning.options import TuneOptions

REPORT = "tune_report.json"
GAP = 2.0  # held-out loss over that of the last steps, above which trajectories were learned by heart
Figures = Mapping[str, Mapping[str, Agreement]]  # scheme -> agent -> figures


@dataclass(frozen=True)
class RoundReport:
    """One round.

    Args:
        steps, planned: optimizer steps taken and planned.
        kept_step: the step whose weights were kept; 0: those that the round began with.
        stopped: "time" or "no improvement"; "" if all planned steps were taken.
        seconds: time of the steps.
        losses: (step, mean loss of a generated token) of every step; held_out: (step, value) of every evaluation.
    """

    steps: int
    planned: int
    kept_step: int
    stopped: str
    seconds: float
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Given:
    """Input of a run, as JSON gives it back.

    Args:
        model: directory or hub id; adapters: agent -> directory or hub id.
        trajectories: files.
        options: see `options_as_json`.
    """

    model: str
    adapters: Mapping[str, str]
    trajectories: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class TuneReport:
    """A tuning run.

    Args:
        out: folder of the tuned adapters, one directory an agent.
        sharing: the scheme that they were tuned for.
        agents: their names.
        trajectories: number that steps learned from, in the last round; measured: number behind `before` and `after`.
        held_out: True if no step learned from those measured.
        before, after: figures of the adapters as given and as saved, on the same trajectories of the last round.
        notes: sentences on what was skipped and on what is unusual.
        given: input of the run; None in a file of an older version.
    """

    out: Path
    sharing: str
    agents: tuple[str, ...]
    trajectories: int
    measured: int
    held_out: bool
    rounds: tuple[RoundReport, ...]
    before: Figures
    after: Figures
    notes: tuple[str, ...]
    given: Given | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**dataclasses.asdict(self), "out": str(self.out)}


def options_as_json(options: TuneOptions) -> dict[str, Any]:
    """Options as JSON gives them back."""
    used: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options)))
    return used


def write_report(report: TuneReport) -> None:
    """Writes `REPORT` into the folder; its presence tells that the run has ended.

    Raises:
        TuneError: it can't be written.
    """
    path = report.out / REPORT
    try:
        with replacing(path) as file:
            file.write(json.dumps(report.to_dict(), indent=1).encode())
    except OSError as error:
        raise TuneError(f"{path} can't be written: {error.strerror}", "Make room, then use --resume.") from error


def read_report(out: Path) -> TuneReport | None:
    """The report of a run that has ended; None if there is none.

    Raises:
        TuneError: the file is damaged.
    """
    path = out / REPORT
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_bytes())
        return TuneReport(
            **{
                **raw,
                "out": out,
                "agents": tuple(raw["agents"]),
                "notes": tuple(raw["notes"]),
                "rounds": tuple(
                    RoundReport(**{**entry, **{name: _pairs(entry[name]) for name in ("losses", "held_out")}})
                    for entry in raw["rounds"]
                ),
                "before": figures_from_json(raw["before"]),
                "after": figures_from_json(raw["after"]),
                "given": _given(raw.get("given")),
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TuneError(
            f"{path} is damaged: {type(error).__name__}: {error}", "Start anew with --overwrite."
        ) from error


def figures_from_json(raw: Mapping[str, Mapping[str, Any]]) -> Figures:
    """Figures as `dataclasses.asdict` and JSON gave them."""
    return {scheme: {name: Agreement(**row) for name, row in rows.items()} for scheme, rows in raw.items()}


def _given(raw: Mapping[str, Any] | None) -> Given | None:
    return None if raw is None else Given(**{**raw, "trajectories": tuple(raw["trajectories"])})


def too_few_trajectories(report: RoundReport, after: Mapping[str, Agreement]) -> str:
    """A sentence if an agent is apart on held-out trajectories and the trajectories of the steps are learned; else "".

    Args:
        after: figures on held-out trajectories under the target scheme, by agent.
    """
    values = dict(report.held_out)
    losses = [loss for step, loss in report.losses if 3 * report.kept_step // 4 <= step < report.kept_step]
    if not losses or report.kept_step not in values:
        return ""
    learned, value = sum(losses) / len(losses), values[report.kept_step]
    agent = max(after, key=lambda name: after[name].kl)
    if after[agent].kl <= MAX_KL or value <= GAP * learned:
        return ""
    return (
        f"{agent} is still {after[agent].kl:.3f} nats a token apart, and the loss on held-out trajectories is "
        f"{value / learned:.1f} times that of the last steps: more trajectories would help"
    )


def _pairs(values: Any) -> tuple[tuple[int, float], ...]:
    return tuple((int(step), float(value)) for step, value in values)
