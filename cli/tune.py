"""`lragent tune`: adapters for a shared cache from trajectories of the agents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

import lragent
from lragent.files.user_path import user_path
from lragent.program.defaults import TUNED_SHARING
from lragent.tuning.options import Arithmetic, TuneOptions
from lragent.tuning.report_text import COLUMNS, change_rows, convert_command, measured_on

from .adapter_arguments import parse_adapters
from .engine_options import Adapters, AsJson, ModelArgument, Scheme, Threads, parse_schemes
from .html_file import require_page_place, write_page
from .output import print_json, results
from .quantities import show_seconds
from .tune_progress import TuneProgress

if TYPE_CHECKING:
    from lragent.tuning.report import TuneReport

DEFAULTS = TuneOptions()
TRAINED: dict[str, Literal["both", "a", "b"]] = {"A,B": "both", "A": "a", "B": "b"}


def tune(
    model_dir: ModelArgument,
    adapters: Adapters,
    trajectories: Annotated[
        list[Path],
        typer.Option(
            metavar="RESULTS.jsonl",
            parser=user_path,
            help="Results of `lragent rollout --sharing non_shared`, or gold; may be given more than once.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="TUNED/", parser=user_path, help="Folder for the tuned adapters.")
    ],
    sharing: Annotated[Scheme, typer.Option(help="Scheme that the agents will run under.")] = TUNED_SHARING,
    steps: Annotated[int, typer.Option(help="Most optimizer steps.")] = DEFAULTS.steps,
    minutes: Annotated[float, typer.Option(help="Time of a round; steps that don't fit into it are left out.")] = (
        DEFAULTS.minutes
    ),
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine schedule. Default: by hidden size.", show_default=False)
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = DEFAULTS.batch_tokens,
    held_out: Annotated[float, typer.Option(help="Share of the trajectories that no step sees.")] = DEFAULTS.held_out,
    patience: Annotated[
        int, typer.Option(help="Evaluations in a row, worse than the best beyond noise, that end the round; 0: none.")
    ] = DEFAULTS.patience,
    kl: Annotated[
        float | None,
        typer.Option(help="Weight of KL to the agents' own distribution. Default: 1, for gold 0.", show_default=False),
    ] = None,
    appended_kl: Annotated[
        float | None,
        typer.Option(
            help="Weight of KL of appended tokens. Default: 0.1, for neutral_shared and gold 0.", show_default=False
        ),
    ] = None,
    cross_entropy: Annotated[
        float | None,
        typer.Option(help="Weight of the generated tokens' cross-entropy. Default: 0, for gold 1.", show_default=False),
    ] = None,
    weight_field: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Entry of a line, such as result.score, that weighs its cross-entropy. Default: the reward, if any.",
            show_default=False,
        ),
    ] = None,
    non_shared_share: Annotated[
        float, typer.Option(help="Share of the steps under non_shared, which keeps that scheme good too.")
    ] = DEFAULTS.non_shared_share,
    permuted_writers: Annotated[
        float, typer.Option(help="Share of the steps in which random agents process appended tokens.")
    ] = DEFAULTS.permuted_writers,
    train: Annotated[Literal["A,B", "A", "B"], typer.Option(help="Matrices that are trained.")] = "A,B",
    untie: Annotated[bool, typer.Option("--untie", help="Let agents that share an A get one each.")] = False,
    add_modules: Annotated[
        str, typer.Option(metavar="NAME,...", help="Linear modules that get new adapters; all-linear for all.")
    ] = "",
    add_rank: Annotated[
        int | None, typer.Option(help="Rank of new adapters. Default: that of the agent.", show_default=False)
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds; after the first, on what the tuned agents roll out under the scheme.")
    ] = 1,
    workflow: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNC", help="Workflow of rounds after the first.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(metavar="TASKS.jsonl", parser=user_path, help="Tasks of rounds after the first.")
    ] = None,
    report_schemes: Annotated[
        str, typer.Option(metavar="A,B,...", help="More schemes in the report, besides this one and non_shared.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the order of trajectories and of the held-out ones.")] = DEFAULTS.seed,
    dtype: Annotated[
        str, typer.Option(help="Of the model: auto (that of the run that wrote the trajectories), float32, bfloat16.")
    ] = DEFAULTS.dtype,
    arithmetic: Annotated[
        Arithmetic, typer.Option(help="Of a float32 model; auto: bfloat16 where the processor has it.")
    ] = "auto",
    threads: Threads = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help="Also write the report as a page; with --resume, that of a run that has ended.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: the steps that are left.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tune adapters so that their agents behave under a shared cache as they do without one.

    Each step teaches the agents, through the shared cache, the distribution that they had under non_shared. TUNED/ gets
    one PEFT adapter directory an agent.
    """
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if rounds > 1 and (workflow is None or tasks is None):
        raise typer.BadParameter("--rounds above 1 needs --workflow and --tasks")
    if html is not None and html.parent.resolve() != out.resolve():
        require_page_place(html)
    options = TuneOptions(
        steps=steps,
        minutes=minutes,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        held_out=held_out,
        patience=patience,
        kl=kl,
        appended_kl=appended_kl,
        cross_entropy=cross_entropy,
        weight_field=weight_field,
        non_shared_share=non_shared_share,
        permuted_writers=permuted_writers,
        train=TRAINED[train],
        tie_a=not untie,
        add_modules=tuple(name.strip() for name in add_modules.split(",") if name.strip()),
        add_rank=add_rank,
        seed=seed,
        dtype=dtype,
        arithmetic=arithmetic,
        report_schemes=parse_schemes(report_schemes) if report_schemes else (),
    )
    try:
        with TuneProgress() as bar:
            report = lragent.tune(
                model_dir,
                parse_adapters(adapters),
                trajectories,
                out,
                sharing,
                options,
                existing="resume" if resume else "overwrite" if overwrite else "refuse",
                rounds=rounds,
                workflow=workflow,
                tasks=tasks,
                threads=threads,
                progress=bar.stage,
                on_step=bar.step,
            )
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {out} has a checkpoint; go on with --resume", err=True)
        raise
    if as_json:
        print_json(report.to_dict())
    else:
        results.print(report_table(report))
        for line in report_lines(report):
            results.print(line, markup=False, soft_wrap=True)
    if html is not None:
        from lragent.tuning.tune_page import tune_page

        write_page(html, tune_page(report))


def report_table(report: TuneReport) -> Table:
    """One row for each scheme and agent, with figures before and after."""
    table = Table(title=f"tuned for {report.sharing}; {measured_on(report)}", title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in change_rows(report):
        table.add_row(*row)
    return table


def report_lines(report: TuneReport) -> list[str]:
    """Sentences on the run: steps and time, notes, and the next command."""
    seconds = sum(one.seconds for one in report.rounds)
    steps = sum(one.steps for one in report.rounds)
    lines = [f"{steps} steps on {report.trajectories} trajectories in {show_seconds(seconds)}"]
    lines += [f"note: {note}" for note in report.notes]
    return [*lines, f"next: {convert_command(report)}"]
