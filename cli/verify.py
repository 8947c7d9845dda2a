"""`lragent verify`: compares an artifact with plain PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import lragent
from lragent.errors import TaskFileError
from lragent.files.user_path import user_path
from lragent.program.defaults import ATTENTION, BACKEND

from .adapter_arguments import parse_adapters
from .engine_options import (
    Adapters,
    AllowCompiled,
    ArtifactArgument,
    AsJson,
    Attention,
    Backend,
    EngineOptions,
    Schemes,
    Threads,
    parse_schemes,
)
from .output import print_json, results, stages

if TYPE_CHECKING:
    from lragent.reports.verification import Comparison
    from lragent.runtime import Engine

VERIFY_MEMORY = "512MiB"


def verify(
    artifact: ArtifactArgument,
    model: Annotated[str, typer.Option(metavar="MODEL_DIR", help="The model from which it was converted.")],
    adapters: Adapters,
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
    schemes: Schemes = "non_shared,base_lr_shared",
    backend: Backend = BACKEND,
    attention: Attention = ATTENTION,
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    as_json: AsJson = False,
) -> None:
    """Compare an artifact with PEFT in float32: first turns of every agent, which are exact under every sharing scheme;
    under neutral_shared those of base only.

    Files are hashed first. The exit code is 1 if a difference is above the tolerance.
    """
    chosen, texts = parse_schemes(schemes), read_prompts(prompts)
    options = EngineOptions(
        VERIFY_MEMORY, backend=backend, attention=attention, threads=threads, allow_compiled=allow_compiled
    )

    def engine_for(sharing: str) -> Engine:
        return options.load(artifact, sharing)

    with stages("verifying") as show:
        found = lragent.verify(
            artifact,
            model,
            parse_adapters(adapters),
            prompts=texts,
            schemes=chosen,
            new_tokens=new_tokens,
            tolerance=tolerance,
            engine_for=engine_for,
            progress=show,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        verdict = "equal" if found.equal else "NOT EQUAL"
        title = f"{artifact} against PEFT" + ("" if found.on_text else ", on token ids: the artifact has no tokenizer")
        results.print(comparison_table(found.comparisons, title))
        results.print(f"largest difference {found.worst:.2e}, tolerance {found.tolerance:.2e}: {verdict}")
    if not found.equal:
        raise typer.Exit(1)


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
