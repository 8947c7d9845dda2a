"""`lragent verify`: compares an artifact with plain PEFT, and measures the drift of sharing schemes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import lragent
from lragent.errors import TaskFileError
from lragent.files.user_path import user_path
from lragent.program.defaults import ATTENTION, BACKEND, MAX_KL

from .adapter_arguments import parse_adapters
from .drift_tables import print_drift
from .engine_options import (
    AllowCompiled,
    ArtifactArgument,
    AsJson,
    Attention,
    Backend,
    EngineOptions,
    MaxKl,
    Threads,
    parse_schemes,
)
from .html_file import require_page_place, write_page
from .output import print_json, results, stages

if TYPE_CHECKING:
    from lragent.reports.drift_report import DriftReport
    from lragent.reports.verification import Comparison, Verification
    from lragent.runtime import Engine

VERIFY_MEMORY = "512MiB"
PEFT_SCHEMES = "non_shared,base_lr_shared"


def verify(
    artifact: ArtifactArgument,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL_DIR", help="The model from which it was converted, for a comparison.")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(metavar="NAME=DIR,...", help="Its adapters, with --model; see `lragent convert`.")
    ] = None,
    trajectories: Annotated[
        Path | None,
        typer.Option(
            metavar="RESULTS.jsonl",
            parser=user_path,
            help="Results of `lragent rollout`, best under non_shared: measures on them what each scheme changes.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help="One prompt a line. Default: three short ones; without a tokenizer, random token ids.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each prompt.")] = 32,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest accepted difference of log-probabilities. Default: 0.001; for an artifact of 16 bits, twice "
            "the error of PEFT in that dtype if that is more.",
            show_default=False,
        ),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help=f"Sharing schemes. Default: {PEFT_SCHEMES} for a comparison, all but non_shared for drift.",
            show_default=False,
        ),
    ] = None,
    max_kl: MaxKl = MAX_KL,
    most: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --trajectories, run at most so many, spread over the file.")
    ] = 32,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Also write the drift as a page.", show_default=False),
    ] = None,
    backend: Backend = BACKEND,
    attention: Attention = ATTENTION,
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    as_json: AsJson = False,
) -> None:
    """Compare an artifact with PEFT (--model), or measure the drift of sharing schemes (--trajectories), or both.

    The comparison hashes all files, then compares first turns of every agent, which are exact under every sharing
    scheme, with PEFT in float32. The exit code is 1 if a difference is above the tolerance.

    The drift is the KL of each scheme against non_shared on the tokens of the trajectories. It is kept in the artifact,
    where --sharing auto finds it.
    """
    chosen = None if schemes is None else parse_schemes(schemes)
    if model is None and trajectories is None:
        raise typer.BadParameter("give --model and --adapters, or --trajectories")
    if (model is None) != (adapters is None):
        raise typer.BadParameter("--model and --adapters go together")
    if html is not None and trajectories is None:
        raise typer.BadParameter("--html shows the drift: give --trajectories")
    if html is not None:
        require_page_place(html)
    texts = read_prompts(prompts)
    found: Verification | None = None
    drift: DriftReport | None = None
    options = EngineOptions(
        VERIFY_MEMORY, backend=backend, attention=attention, threads=threads, allow_compiled=allow_compiled
    )

    def engine_for(sharing: str) -> Engine:
        return options.load(artifact, sharing)

    with stages("verifying") as show:
        if model is not None and adapters is not None:
            found = lragent.verify(
                artifact,
                model,
                parse_adapters(adapters),
                prompts=texts,
                schemes=chosen or parse_schemes(PEFT_SCHEMES),
                new_tokens=new_tokens,
                tolerance=tolerance,
                engine_for=engine_for,
                progress=show,
            )
        if trajectories is not None:
            shared = None if chosen is None else tuple(name for name in chosen if name != "non_shared")
            drift = lragent.drift(artifact, trajectories, shared, max_kl, most, show)
    if as_json:
        facts: dict[str, Any] = {} if found is None else found.to_dict()
        print_json(facts if drift is None else {**facts, "drift": drift.to_dict()})
    else:
        if found is not None:
            print_comparison(found, artifact)
        if drift is not None:
            print_drift(drift, results)
    if html is not None and drift is not None:
        from lragent.reports.drift_page import drift_page

        write_page(html, drift_page(drift))
    if found is not None and not found.equal:
        raise typer.Exit(1)


def print_comparison(found: Verification, artifact: Path) -> None:
    verdict = "equal" if found.equal else "NOT EQUAL"
    title = f"{artifact} against PEFT" + ("" if found.on_text else ", on token ids: the artifact has no tokenizer")
    results.print(comparison_table(found.comparisons, title))
    results.print(f"largest difference {found.worst:.2e}, tolerance {found.tolerance:.2e}: {verdict}")


def read_prompts(file: Path | None) -> tuple[str, ...] | None:
    """The prompts of a file, one a line; None without a file.

    Raises:
        TaskFileError: the file can't be read, or has no prompt.
    """
    if file is None:
        return None
    try:
        prompts = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise TaskFileError(f"{file} can't be read: {error}", "Give a UTF-8 file with one prompt a line.") from error
    if not prompts:
        raise TaskFileError(f"{file} has no prompt", "Write one prompt a line.")
    return prompts


def comparison_table(comparisons: Sequence[Comparison], title: str) -> Table:
    """One row for each scheme and agent."""
    table = Table(title=title, title_justify="left")
    table.add_column("sharing")
    table.add_column("agent")
    rounds = any(row.own for row in comparisons)
    own_column = ("PEFT's own, in that dtype",) if rounds else ()
    for column in ("tokens as PEFT", "PEFT prefers another by", "log-probability differs by", *own_column):
        table.add_column(column, justify="right")
    for row in comparisons:
        figures = [f"{row.same} of {row.tokens}", f"{row.behind:.1e}", f"{row.difference:.1e}"]
        table.add_row(row.sharing, row.agent, *figures, *([f"{row.own:.1e}"] if rounds else []))
    return table
