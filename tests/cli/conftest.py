"""The command line as a user calls it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lragent_cli.main import app
from tests.models import WrittenModel

EAGER = ("--backend", "eager", "--kv-memory", "4MiB")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, what it printed where."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def call(*arguments: object) -> Outcome:
    """Runs `lragent ARGUMENTS`; an exception that isn't a user's error goes on."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def text_of(printed: Any) -> str:
    """What a terminal would show of a table."""
    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(printed)
    return console.export_text()


def adapters_option(written: WrittenModel) -> str:
    return ",".join(f"{name}={path}" for name, path in written.adapters.items())


@pytest.fixture(autouse=True)
def _each_call_imports_anew(forget_workflows: None) -> None:
    """Every call of the command imports its workflow, as in a process of its own."""
