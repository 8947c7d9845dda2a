"""The page and the file of a tuning report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from lragent.errors import TuneError
from lragent.tuning.measure import Agreement
from lragent.tuning.options import TuneOptions
from lragent.tuning.report import Given, RoundReport, TuneReport, options_as_json, read_report, write_report
from lragent.tuning.report_text import change_rows, convert_command
from lragent.tuning.tune_page import tune_page
from tests.reports.html.test_page import require_self_contained

ONE = RoundReport(40, 50, 20, "time", 90.0, tuple((i, 0.5 / (i + 1)) for i in range(40)), ((20, 0.0123), (40, 0.02)))


def figures(kl: float, turns: float) -> dict[str, Agreement]:
    return {
        "plan": Agreement(100, 10, kl / 100, 1.0, 0.1, 1.0),
        "reflect": Agreement(30, 5, kl, 0.8 + turns / 5, 0.2, turns),
    }


def report_in(out: Path) -> TuneReport:
    options = options_as_json(TuneOptions(steps=50))
    return TuneReport(
        out=out,
        sharing="base_lr_shared",
        agents=("plan", "reflect"),
        trajectories=7,
        measured=3,
        held_out=True,
        rounds=(ONE,),
        before={"non_shared": figures(0.0, 1.0), "base_lr_shared": figures(0.85, 0.0)},
        after={"non_shared": figures(0.003, 0.9), "base_lr_shared": figures(0.027, 0.8)},
        notes=("skipped lines whose task ended in an error: 2", "kept the weights of step 20 <b>"),
        given=Given("models/a model", {"plan": "a/plan", "reflect": "a/reflect"}, ("own.jsonl",), options),
    )


def test_the_page_needs_nothing_and_shows_the_report(tmp_path: Path) -> None:
    report = report_in(tmp_path / "tuned")
    source = tune_page(report)
    found = require_self_contained(source)
    assert len(source) < 100_000
    for row in change_rows(report):
        assert set(row) <= set(found.texts)
    shown = " ".join(found.texts)
    for text in (
        f"Adapters tuned for base_lr_shared: {tmp_path / 'tuned'}",
        "40 steps on 7 trajectories in 1.5 minutes; compared, teacher-forced, on 3 held-out trajectories",
        "reflect was farthest from its own distribution, by 0.85 nats a token; after tuning reflect is, by 0.027",
        "Turns all right: 67% before, 93% after",
        "40 of 50 planned steps",
        "kept: step 20",
        "held-out trajectories, step 20: 0.0123",
        *report.notes,
        f"lragent convert 'models/a model' --adapters plan={tmp_path / 'tuned' / 'plan'},reflect=",
        "model: models/a model",
        "trajectories: own.jsonl",
    ):
        assert text in shown, text
    assert "<b>" not in source
    assert {name.name for name in dataclasses.fields(TuneOptions)} <= set(found.texts)
    assert source.count("<svg") == 4
    changed = re.findall(r'<tr class="chosen"><td class="name">(\w+)</td>', source)
    assert changed == ["steps"]  # the learning rate is the scheme's


def test_dots_tell_before_from_after(tmp_path: Path) -> None:
    texts = require_self_contained(tune_page(report_in(tmp_path))).texts
    for row, before, after in (("reflect", "0.85", "0.027"), ("plan", "0.0085", "0.00027")):
        assert f"base_lr_shared, {row}, before: {before}" in texts and f"base_lr_shared, {row}, after: {after}" in texts
    assert "base_lr_shared, reflect, before: 0.0%" in texts and "base_lr_shared, reflect, after: 80.0%" in texts


def test_rounds_without_held_out_trajectories_have_a_chart_each(tmp_path: Path) -> None:
    bare = dataclasses.replace(ONE, held_out=(), kept_step=40, stopped="")
    source = tune_page(dataclasses.replace(report_in(tmp_path), rounds=(bare, bare), held_out=False, notes=()))
    shown = " ".join(require_self_contained(source).texts)
    assert "Loss over steps, round 2" in shown and "No trajectory was held out" in shown and "kept: step" not in shown
    assert "3 trajectories that it learned from" in shown and "Nothing was skipped" in shown
    assert source.count("<svg") == 5


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = report_in(tmp_path)
    write_report(report)
    assert read_report(tmp_path) == report
    path = tmp_path / "tune_report.json"
    older = json.loads(path.read_text())
    del older["given"]
    path.write_text(json.dumps(older))
    read = read_report(tmp_path)
    assert read == dataclasses.replace(report, given=None)
    assert read is not None and convert_command(read).startswith("lragent convert MODEL --adapters plan=")
    assert not re.search("Input and options|None", tune_page(read))
    path.write_text(json.dumps({**older, "given": {"model": "m"}}))
    with pytest.raises(TuneError, match="is damaged"):
        read_report(tmp_path)
