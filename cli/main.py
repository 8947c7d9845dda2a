"""Entry point of `lragent`: the commands, and the form of errors.

A `UserError` is printed as one line and a hint; the exit code is 1. Wrong usage has exit code 2. Other errors keep
their traceback.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lragent.errors import UserError

from .bench import bench
from .convert import convert
from .demo import demo
from .inspect import inspect
from .rollout import rollout
from .roofline import roofline
from .tune import tune
from .verify import verify


class OneLineErrors(TyperGroup):
    """Prints a `UserError` of any command as one line and a hint."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {' '.join(error.message.split())}", err=True)
            if error.hint:
                typer.echo(f"hint: {' '.join(error.hint.split())}", err=True)
            raise typer.Exit(1) from error


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lragent {version('lragent')}")
        raise typer.Exit


app = typer.Typer(
    cls=OneLineErrors,
    name="lragent",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def lragent(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Agents as LoRA adapters on one model, sharing one KV cache."""


for command in (convert, inspect, rollout, tune, verify, bench, roofline, demo):
    app.command()(command)


def main() -> None:
    app(sys.argv[1:], prog_name="lragent")
