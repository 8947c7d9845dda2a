"""update and convert over a compiled artifact: equal programs keep their packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config

import lragent
from lragent.artifact.directory import open_artifact
from lragent.compile.compile import target_name
from tests.artifact.update_cases import named, turns_made_anew, turns_of
from tests.models import WrittenModel

pytestmark = pytest.mark.integration  # the artifact compiles for longer than 20 s


@pytest.fixture(scope="module")
def converted(written: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of plan and action with a spare slot, compiled for split layout; read only."""
    out = tmp_path_factory.mktemp("converted") / "m.lragent"
    lragent.convert(written.model_dir, named(written, "plan", "action"), out, layouts=("split",), spare=1)
    return out


SETS = {
    "replaced": {"plan": "other", "action": "action"},
    "added": {"plan": "plan", "action": "action", "new": "small"},
    "replaced, added and removed": {"new": "other", "newer": "plan", "action": "small"},
}


@pytest.mark.parametrize("name", SETS)
def test_an_updated_artifact_runs_its_compiled_program(
    name: str, written: WrittenModel, artifact: Path, tmp_path: Path
) -> None:
    adapters = named(written, **SETS[name])
    packages = {path: path.stat().st_mtime_ns for path in artifact.glob("compiled/*/*.pt2")}
    report = lragent.update(artifact, written.model_dir, adapters)
    assert set(report.agents) == set(adapters)
    assert {path: path.stat().st_mtime_ns for path in artifact.glob("compiled/*/*.pt2")} == packages
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        engine = lragent.load(artifact, "base_lr_shared", kv_memory="1MiB")
    assert set(engine.agents) == {"base", *adapters}
    expected = turns_made_anew(written, adapters, "base_lr_shared", tmp_path)
    assert turns_of(engine, (*adapters, "base")) == pytest.approx(expected, abs=1e-4)
    anew = lragent.load(tmp_path / "anew.lragent", sharing="non_shared", backend="eager", kv_memory="1MiB")
    exact = lragent.load(artifact, sharing="non_shared", backend="eager", kv_memory="1MiB")
    agents = (*adapters, "base")
    assert turns_of(exact, agents) == pytest.approx(turns_of(anew, agents), abs=1e-4)
    assert len(list((artifact / "weights").iterdir())) == 2  # the old adapters' file is gone


def test_converting_over_an_artifact_keeps_packages_of_equal_programs(
    written: WrittenModel, artifact: Path, tmp_path: Path
) -> None:
    """Three agents of rank 4, as before: nothing is compiled. With a larger rank, the program is another."""
    adapters = named(written, "plan", "action", third="other")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        report = lragent.convert(written.model_dir, adapters, artifact, overwrite=True, compiled=False)
        assert report.compiled == ()
        engine = lragent.load(artifact, "base_lr_shared", kv_memory="1MiB")
    assert turns_of(engine, (*adapters, "base")) == pytest.approx(
        turns_made_anew(written, adapters, "base_lr_shared", tmp_path), abs=1e-4
    )
    lragent.convert(
        written.model_dir, named(written, "plan", "action", third="large"), artifact, overwrite=True, compiled=False
    )
    assert target_name() not in open_artifact(artifact).manifest.compiled
