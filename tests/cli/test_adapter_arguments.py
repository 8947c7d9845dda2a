from pathlib import Path

import pytest
import typer

from lragent_cli.adapter_arguments import parse_adapters


def test_named_adapters_keep_their_order() -> None:
    parsed = parse_adapters("plan=a/p, action=b , reflect=/c/r")
    assert list(parsed.items()) == [("plan", "a/p"), ("action", "b"), ("reflect", "/c/r")]


def test_directories_without_names_lend_their_own() -> None:
    assert list(parse_adapters("runs/plan,runs/action/,./reflect")) == ["plan", "action", "reflect"]


def test_the_current_directory_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan").mkdir()
    monkeypatch.chdir(tmp_path / "plan")
    assert list(parse_adapters(".")) == ["plan"]


def test_a_path_may_hold_an_equals_sign_after_its_name() -> None:
    assert parse_adapters("plan=runs/lr=1e-3") == {"plan": "runs/lr=1e-3"}


@pytest.mark.parametrize("text", ["a/plan,b/plan", "plan=a,plan=b", "plan=a,b/plan"])
def test_a_name_given_twice_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="two adapters have the name 'plan'"):
        parse_adapters(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "''"), ("plan=a,", "''"), ("plan=", "'plan='"), ("=dir", "'=dir'"), ("/", "'/'")],
    ids=["nothing", "trailing comma", "no directory", "no name", "root directory"],
)
def test_what_is_no_adapter_is_named(text: str, found: str) -> None:
    with pytest.raises(typer.BadParameter, match=found):
        parse_adapters(text)


def test_a_hub_id_lends_its_name_without_owner_and_revision() -> None:
    assert parse_adapters("org/plan,org/action@v2") == {"plan": "org/plan", "action": "org/action@v2"}


def test_the_home_directory_lends_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    assert parse_adapters("~,~/plan") == {"ada": "~", "plan": "~/plan"}
