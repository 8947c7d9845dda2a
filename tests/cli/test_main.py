import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from lragent.errors import ArtifactError, UserError
from lragent.runtime.schemes import SCHEMES as RUNTIME_SCHEMES
from lragent_cli.engine_options import SCHEMES, Scheme, parse_schemes
from lragent_cli.main import OneLineErrors
from tests.cli.conftest import call


def app_that(raises: Callable[[], None]) -> typer.Typer:
    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
    app.command()(raises)
    app.command("other")(lambda: None)
    return app


def test_a_known_error_is_one_line_and_a_hint() -> None:
    def broken() -> None:
        raise ArtifactError("m.lragent is\n  damaged", "Convert\nagain.")

    result = CliRunner().invoke(app_that(broken), ["broken"])
    assert result.exit_code == 1
    assert result.stderr == "error: m.lragent is damaged\nhint: Convert again.\n"
    assert result.stdout == ""


def test_an_error_without_hint_is_one_line() -> None:
    def broken() -> None:
        raise UserError("no")

    result = CliRunner().invoke(app_that(broken), ["broken"])
    assert (result.exit_code, result.stderr) == (1, "error: no\n")


def test_any_other_exception_keeps_its_traceback() -> None:
    def broken() -> None:
        raise ZeroDivisionError("ours")

    result = CliRunner().invoke(app_that(broken), ["broken"])
    assert isinstance(result.exception, ZeroDivisionError)
    assert "error:" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing-like-that",),
        ("rollout", "m.lragent"),
        ("rollout", "m.lragent", "--workflow", "f.py:f", "--tasks", "t", "--out", "r", "--sharing", "all_shared"),
        ("convert", "model", "--adapters", "plan=a,plan=b", "-o", "m.lragent"),
        ("bench", "m.lragent", "--schemes", "non_shared,non_shared"),
        ("bench", "m.lragent", "--turns", "0"),
    ],
    ids=["command", "missing option", "scheme", "adapters", "scheme twice", "range"],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version").out.startswith("lragent 0.")


def test_help_names_every_command() -> None:
    shown = call("--help").out
    for command in ("convert", "inspect", "rollout", "verify", "bench", "roofline", "demo"):
        assert command in shown


def test_help_does_not_import_torch() -> None:
    program = "import sys; import lragent_cli.main; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))


def test_the_schemes_are_those_of_the_runtime() -> None:
    assert SCHEMES == tuple(RUNTIME_SCHEMES) == get_args(Scheme)


def test_schemes_are_parsed_in_order() -> None:
    assert parse_schemes("rebase_shared, non_shared") == ("rebase_shared", "non_shared")
    with pytest.raises(typer.BadParameter, match="unknown sharing scheme 'all'; there are non_shared"):
        parse_schemes("non_shared,all")


def test_the_installed_script_ends_with_the_exit_code(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lragent")
    done = subprocess.run([script, "inspect", tmp_path / "no.lragent"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no artifact directory at {tmp_path / 'no.lragent'}\nhint: ")
    assert "Traceback" not in done.stderr
