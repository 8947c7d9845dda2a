"""The report on an artifact's drift: recommendation, page, and what it keeps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import lragent
from lragent.artifact.directory import open_artifact
from lragent.artifact.kept_drift import read_kept_drift
from lragent.errors import ArtifactError, RequestError, TaskFileError
from lragent.program.drift import SchemeDrift, Tally
from lragent.reports.drift_page import drift_page
from lragent.reports.drift_report import recommend
from lragent.training.drift import SHARED
from tests.reports.html.test_page import require_self_contained
from tests.runtime.test_cheapest_scheme import SIZES, measured


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two gold trajectories of three agents."""
    file = tmp_path_factory.mktemp("gold") / "gold.jsonl"
    with file.open("w") as lines:
        for start in (3, 8):
            ids = [(start * i * i + 7 * i) % 120 for i in range(60)]
            spans = [["plan", None, 5, 20], ["action", None, 24, 30], ["reflect", None, 30, 50], ["plan", None, 52, 60]]
            lines.write(json.dumps({"token_ids": ids, "generated": spans}) + "\n")
    return file


@pytest.fixture
def artifact(eager_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(eager_artifact, tmp_path / "m <b>.lragent"))


def test_drift_is_measured_shown_and_kept(artifact: Path, trajectories: Path) -> None:
    stages: list[str] = []
    report = lragent.drift(artifact, trajectories, progress=stages.append)
    assert stages == ["opening the model", "trajectory 1 of 2", "trajectory 2 of 2", "comparing streams"]
    assert [one.scheme for one in report.drift.schemes] == list(SHARED)
    assert (report.drift.sequences, report.drift.tokens) == (2, 2 * (15 + 6 + 20 + 8))
    assert report.recommendation.scheme == "non_shared"  # strong random adapters
    assert "lragent tune" in report.recommendation.reason
    assert read_kept_drift(open_artifact(artifact)) == {one.scheme: one for one in report.drift.schemes}
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["recommendation"], found["tokens"], len(found["schemes"])) == ("non_shared", 98, len(SHARED))
    assert {agent: entry["tokens"] for agent, entry in found["schemes"][0]["by_agent"].items()} == {
        "plan": 46,
        "action": 12,
        "reflect": 40,
    }
    assert len(found["streams"]) == 6 * 2 and all(pair["low_rank"] > 0 for pair in found["streams"])
    large = lragent.drift(artifact, trajectories, ["base_lr_shared"], max_kl=100.0, most=1)
    assert large.drift.sequences == 1 and large.notes == ("1 of 2 trajectories were taken",)
    assert large.recommendation.scheme == "base_lr_shared"
    engine = lragent.load(artifact, max_kl=100.0, backend="eager", kv_memory="1MiB")
    assert engine.evidence.reason == "measured"


def test_the_page_needs_nothing_and_shows_all_numbers(artifact: Path, trajectories: Path) -> None:
    report = lragent.drift(artifact, trajectories)
    assert "Notes" not in require_self_contained(drift_page(report)).texts
    report = dataclasses.replace(report, notes=("1 of 2 trajectories were taken",))
    source = drift_page(report)
    page = require_self_contained(source)
    assert len(source) < 200_000
    shown = " ".join(page.texts)
    assert "Notes 1 of 2 trajectories were taken" in shown
    assert f"Sharing drift of {artifact}" in shown and "<b>" not in source
    for one in report.drift.schemes:
        assert one.scheme in page.texts and f"{one.total.agreement:.1%}" in page.texts
        for tally in (*one.by_agent.values(), *one.by_distance.values(), *one.by_context.values()):
            assert f"{tally.mean_kl:.2g} ({tally.agreement:.1%}, {tally.tokens})" in page.texts


def test_recommendations_give_their_reason() -> None:
    agents = ("plan", "action")
    found = [measured("full_shared", plan=0.01, action=0.3), measured("base_lr_shared", plan=0.002, action=0.02)]
    good = recommend(found, SIZES, 0.05, agents)
    assert good.scheme == "base_lr_shared"
    for text in ("action drifts most, by 0.02", "110 bytes", "instead of 300"):
        assert text in good.reason
    none = recommend(found, SIZES, 0.001, agents)
    assert none.scheme == "non_shared" and "nearest is base_lr_shared with 0.02 (action)" in none.reason
    unseen = recommend(found, SIZES, 0.05, (*agents, "reflect"))
    assert unseen.scheme == "non_shared" and "no turn of reflect" in unseen.reason
    dense = {name: SIZES[name] for name in ("non_shared", "full_shared")}
    assert recommend([found[1]], dense, 0.05, agents).reason == (
        "non_shared: no measured scheme can run on this artifact"
    )


def test_bad_input_is_refused_before_the_model_is_opened(artifact: Path, trajectories: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown sharing scheme 'all'"):
        lragent.drift(artifact, trajectories, ["all"])
    with pytest.raises(RequestError, match="max_kl is 0"):
        lragent.drift(artifact, trajectories, max_kl=0)
    with pytest.raises(TaskFileError, match="can't be read"):
        lragent.drift(artifact, tmp_path / "none.jsonl")
    with pytest.raises(ArtifactError, match="no artifact directory"):
        lragent.drift(tmp_path / "none.lragent", trajectories)


def test_the_last_position_of_the_model_is_the_limit(artifact: Path, tmp_path: Path) -> None:
    """The longest trajectory that the engine can write is measured; a longer one is refused with its line."""

    def gold(read: int) -> Path:
        """One turn whose agent has read so many tokens when it generated the last one."""
        file = tmp_path / f"{read}.jsonl"
        span = ["plan", None, read - 4, read + 1]
        file.write_text(json.dumps({"token_ids": [i % 120 for i in range(read + 1)], "generated": [span]}) + "\n")
        return file

    positions = open_artifact(artifact).manifest.max_positions
    found = lragent.drift(artifact, gold(positions), ["base_lr_shared"])
    assert found.drift.tokens == 5
    with pytest.raises(TaskFileError, match=f"1: its agents read {positions + 1} tokens, the model has {positions} "):
        lragent.drift(artifact, gold(positions + 1), ["base_lr_shared"])


def test_scheme_drift_adds_up() -> None:
    one = SchemeDrift("s", Tally(1, 1.0, 0), {"a": Tally(1, 1.0, 0)}, {}, {"0-127": Tally(1, 1.0, 0)})
    two = SchemeDrift("s", Tally(3, 1.0, 3), {"b": Tally(3, 1.0, 3)}, {}, {"0-127": Tally(3, 1.0, 3)})
    both = one.plus(two)
    assert (both.total.mean_kl, both.total.agreement) == (0.5, 0.75)
    assert both.worst() == ("a", 1.0) and both.covers(["a", "b"]) and not both.covers(["c"])
    assert both.by_context["0-127"] == both.total


def test_a_report_that_can_not_be_kept_is_still_a_report(artifact: Path, trajectories: Path) -> None:
    (artifact / "drift.json").write_text("{")
    report = lragent.drift(artifact, trajectories, ["full_shared"])
    (note,) = report.notes
    assert note.startswith("the drift is not kept in the artifact: ") and "is damaged" in note
    assert (artifact / "drift.json").read_text() == "{"
