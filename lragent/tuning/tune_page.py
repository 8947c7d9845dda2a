"""The HTML page of a `TuneReport`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lragent.program.defaults import MAX_KL
from lragent.reports.html.dot_chart import dot_chart
from lragent.reports.html.linear_scale import LinearScale
from lragent.reports.html.markup import Markup
from lragent.reports.html.page import Section, bullets, code, page, paragraph, verdict
from lragent.reports.html.series import Series
from lragent.reports.html.step_chart import Curve, Mark, step_chart
from lragent.reports.html.table import table
from lragent.tuning.measure import Agreement, overall
from lragent.tuning.options import TuneOptions
from lragent.tuning.report import Figures, Given, RoundReport, TuneReport, options_as_json
from lragent.tuning.report_text import COLUMNS, change_rows, convert_command, measured_on

ARTIFACT = "tuned.lragent"
LOSS_AXIS = "Mean loss of a generated token, in nats"
LEAST_SHARE = 0.9  # axes of shares begin here, or below

# Values of options that are None.
BY_DEFAULT = {
    "learning_rate": "by scheme and hidden size",
    "kl": "1, for gold 0",
    "cross_entropy": "0, for gold 1",
    "weight_field": "the reward, if any",
    "add_rank": "that of the agent",
}


def tune_page(report: TuneReport) -> str:
    """Source of a self-contained page."""
    steps, seconds = sum(one.steps for one in report.rounds), sum(one.seconds for one in report.rounds)
    subtitle = (
        f"{steps} steps on {report.trajectories} trajectories in {seconds / 60:.1f} minutes; compared, teacher-forced, "
        f"on {measured_on(report)}"
    )
    notes = bullets(report.notes) if report.notes else paragraph("Nothing was skipped, and nothing is unusual.")
    advice = paragraph("Convert the tuned adapters, then judge them by rollouts under the scheme:")
    sections = [
        Section("Before and after", list(_before_and_after(report))),
        *_rounds(report),
        Section("Notes", [notes]),
        Section("Next", [advice, code(_commands(report))]),
        *([] if report.given is None else [_input(report.given)]),
        Section("How to read this", _help(report)),
    ]
    return page(f"Adapters tuned for {report.sharing}: {report.out}", subtitle, sections)


def _before_and_after(report: TuneReport) -> Iterator[Markup]:
    yield verdict(_summary(report))
    for title, axis, value, share in (
        (
            "KL a token to the agent's own distribution before tuning, under non_shared",
            "nats a token",
            lambda row: row.kl,
            False,
        ),
        ("Same most likely token as before tuning, under non_shared", "share of tokens", lambda row: row.top1, True),
        ("Turns all right", "share of turns", lambda row: row.turn_accuracy, True),
    ):
        yield _change_chart(report, title, axis, value, share)
    yield table(COLUMNS, change_rows(report), "All figures: before -> after", names=2)


def _summary(report: TuneReport) -> str:
    before, after = (figures[report.sharing] for figures in (report.before, report.after))
    (first, was), (last, now) = (max(rows.items(), key=lambda entry: entry[1].kl) for rows in (before, after))
    right = [overall(dict(rows)).turn_accuracy for rows in (before, after)]
    return (
        f"Under {report.sharing}, {first} was farthest from its own distribution, by {was.kl:.2g} nats a token; after "
        f"tuning {last} is, by {now.kl:.2g}. Turns all right: {right[0]:.0%} before, {right[1]:.0%} after."
    )


def _change_chart(
    report: TuneReport, title: str, axis: str, value: Callable[[Agreement], float], share: bool
) -> Markup:
    """A row for each scheme and agent, with its value before and after."""

    def values(figures: Figures) -> dict[str, float]:
        return {f"{scheme}, {agent}": value(row) for scheme, by in figures.items() for agent, row in by.items()}

    series = [Series("before", values(report.before), ring=True), Series("after", values(report.after))]
    rows = list(series[0].values)
    if not share:
        return dot_chart(title, rows, series, axis, MAX_KL, linked=True)
    least = min([LEAST_SHARE, *(value for one in series for value in one.values.values())])
    scale = LinearScale.over(least, 1.0, percent=True)
    return dot_chart(title, rows, series, axis, None, scale, "{:.1%}".format, linked=True)


def _rounds(report: TuneReport) -> Iterator[Section]:
    for number, one in enumerate(report.rounds, start=1):
        heading = "Loss over steps" if len(report.rounds) == 1 else f"Loss over steps, round {number}"
        curves = [Curve("loss of a step's batch", one.losses, line=False)]
        mark = None
        if one.held_out:
            curves.append(Curve("held-out trajectories", one.held_out, line=True))
            mark = Mark(f"kept: step {one.kept_step}", one.kept_step)
        yield Section(heading, [paragraph(_of_round(one)), step_chart(LOSS_AXIS, curves, one.planned, mark)])


def _of_round(one: RoundReport) -> str:
    text = f"{one.steps} of {one.planned} planned steps in {one.seconds / 60:.1f} minutes."
    return text if one.held_out else f"{text} No trajectory was held out, so the last weights were kept."


def _commands(report: TuneReport) -> list[str]:
    return [
        convert_command(report, ARTIFACT),
        f"lragent rollout {ARTIFACT} --workflow FILE.py:FUNC --tasks tasks.jsonl --out results.jsonl",
    ]


def _input(given: Given) -> Section:
    """Files, and the options; those that are not the default stand out."""
    adapters = [f"{agent}: {source}" for agent, source in given.adapters.items()]
    files = [f"trajectories: {file}" for file in given.trajectories]
    usual = options_as_json(TuneOptions())
    rows = [[name, _value(name, value), _value(name, usual.get(name))] for name, value in given.options.items()]
    changed = [number for number, (_, value, default) in enumerate(rows) if value != default]
    caption = "Options; those that differ from the default in bold"
    options = table(["option", "value", "default"], rows, caption, changed, names=3)
    return Section("Input and options", [bullets([f"model: {given.model}", *adapters, *files]), options])


def _value(name: str, value: Any) -> str:
    """An option as text."""
    if value is None:
        return BY_DEFAULT.get(name, "-")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help(report: TuneReport) -> list[Markup]:
    return [
        paragraph(
            "The teacher of each agent is its own adapter as it was given, under non_shared, where every agent "
            "computes its own cache. For each generated token the agent's distribution under a scheme is compared with "
            "the teacher's, on the same tokens. KL is 0 if nothing differs. A turn is all right if every token of the "
            "trajectory is the agent's most likely one."
        ),
        paragraph(
            f"The limit of {MAX_KL:g} nats a token is the default of --max-kl: drift that counts as no loss. Tuned "
            "agents move towards each other, so figures under non_shared may get worse: use the tuned adapters under "
            f"{report.sharing}, and the ones as given without sharing."
        ),
        paragraph(
            "A step's loss is that of its batch, and batches differ. The values on held-out trajectories, from which "
            "no step learns, decide which weights are kept."
        ),
    ]
