"""`lragent tune` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lragent.tuning.train import TuneStep
from lragent_cli.tune_progress import remark_of
from tests.cli.conftest import Outcome, adapters_option, call
from tests.models import WrittenModel, write_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    return write_model(tmp_path_factory.mktemp("tune"), "llama", "qv")


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    path = tmp_path / "gold.jsonl"
    spans = [["plan", None, 4, 8], ["action", None, 10, 14], ["reflect", None, 16, 20]]
    lines = ({"token_ids": [(i * 7 + j) % 90 for j in range(20)], "generated": spans} for i in range(6))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tune(written: WrittenModel, trajectories: Path, out: Path, *options: object) -> Outcome:
    fixed = ("--adapters", adapters_option(written), "--trajectories", trajectories, "-o", out, "--steps", 2)
    return call("tune", written.model_dir, *fixed, "--held-out", 0.2, *options)


def test_a_table_says_what_changed(written: WrittenModel, gold: Path, tmp_path: Path) -> None:
    done = tune(written, gold, tmp_path / "out", "--kl", 1)
    assert done.code == 0
    for text in ("tuned for base_lr_shared; 1 held-out", "non_shared", "reflect", " -> ", "2 steps on 5 trajectories"):
        assert text in done.out
    assert f"lragent convert {written.model_dir} --adapters plan={tmp_path / 'out' / 'plan'},action=" in done.out
    assert "tuning: load" in done.err and "tuning: 2 steps, about" in done.err and "step 2 of 2, loss" in done.err
    again = tune(written, gold, tmp_path / "out")
    assert again.code == 1 and "hint: Go on with it (--resume)" in again.err


def test_the_report_is_json(written: WrittenModel, gold: Path, tmp_path: Path) -> None:
    options = ("--json", "--sharing", "full_shared", "--train", "B", "--report-schemes", "base_lr_shared")
    found = tune(written, gold, tmp_path / "out", *options).json()
    assert found["sharing"] == "full_shared" and found["agents"] == ["plan", "action", "reflect"]
    assert set(found["after"]) == {"non_shared", "full_shared", "base_lr_shared"}
    assert found == json.loads((tmp_path / "out" / "tune_report.json").read_text())


def test_the_report_is_a_page_at_once_or_later(written: WrittenModel, gold: Path, tmp_path: Path) -> None:
    """A run that has ended gets its page with --resume; nothing is computed then."""
    out = tmp_path / "out"
    assert tune(written, gold, out, "--html", out / "report.html").code == 0  # the folder is made by the run
    at_once = (out / "report.html").read_text()
    assert at_once.startswith("<!doctype html>") and f"model: {written.model_dir}" in at_once
    later = tune(written, gold, out, "--resume", "--html", tmp_path / "later.html")
    assert later.code == 0 and "tuning:" not in later.err
    assert (tmp_path / "later.html").read_text() == at_once


def test_a_page_without_place_is_refused_before_the_first_step(
    written: WrittenModel, gold: Path, tmp_path: Path
) -> None:
    for page, reason in ((tmp_path / "no" / "x.html", "there is no folder"), (tmp_path, "it is a folder")):
        done = tune(written, gold, tmp_path / "out", "--html", page)
        assert done.code == 1 and f"{page} can't be written: {reason}" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--resume", "--overwrite"), "exclude each other"),
        (("--rounds", 2), "needs --workflow and --tasks"),
        (("--train", "C"), "C"),
        (("--report-schemes", "all"), "unknown sharing scheme"),
    ],
)
def test_wrong_usage(written: WrittenModel, gold: Path, tmp_path: Path, options: tuple[object, ...], says: str) -> None:
    done = tune(written, gold, tmp_path / "out", *options)
    assert done.code == 2 and says in done.err
    assert not (tmp_path / "out").exists()


def test_a_value_out_of_range_is_one_line(written: WrittenModel, gold: Path, tmp_path: Path) -> None:
    done = tune(written, gold, tmp_path / "out", "--held-out", 1.5)
    assert done.code == 1 and done.err.startswith("error: held_out is 1.5")


def test_remarks_on_a_step() -> None:
    assert remark_of(TuneStep(0, 100, None, None, 1200)) == "20 min 00 s left"
    assert remark_of(TuneStep(50, 100, 0.125, 0.25, 600)) == "loss 0.1250, held out 0.2500, 10 min 00 s left"
