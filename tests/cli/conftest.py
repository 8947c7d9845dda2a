"""The command line as a user calls it, and an artifact that needs no C++ compiler."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import lragent
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
def forget_workflows(tmp_path: Path) -> Iterator[None]:
    """Modules that a test wrote and imported are gone afterwards, as they are for every run of the command."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    written = [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]
    for name in written:
        del sys.modules[name]


@pytest.fixture(scope="session")
def eager_artifact(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "tiny.lragent"
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out, compiled=False)
    return out
