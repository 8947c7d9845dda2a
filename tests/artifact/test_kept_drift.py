"""Measured drift stays in an artifact until its adapters change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lragent
from lragent.artifact.directory import Artifact, open_artifact
from lragent.artifact.kept_drift import DRIFT, keep_drift, read_kept_drift
from lragent.artifact.manifest import identity
from lragent.errors import ArtifactError
from lragent.program.drift import SchemeDrift, Tally
from tests.models import WrittenModel


def measured(scheme: str, kl: float) -> SchemeDrift:
    tally = Tally(8, 8 * kl, 7)
    return SchemeDrift(scheme, tally, {"plan": tally}, {"0-15": tally}, {"0-127": tally})


@pytest.fixture
def artifact(eager_artifact: Path, tmp_path: Path) -> Artifact:
    return open_artifact(shutil.copytree(eager_artifact, tmp_path / "m.lragent"))


def test_it_is_read_as_it_was_written_and_other_schemes_stay(artifact: Artifact) -> None:
    assert read_kept_drift(artifact) == {}
    keep_drift(artifact, [measured("full_shared", 0.5), measured("base_lr_shared", 0.25)])
    keep_drift(artifact, [measured("full_shared", 0.125)])
    assert read_kept_drift(artifact) == {
        "full_shared": measured("full_shared", 0.125),
        "base_lr_shared": measured("base_lr_shared", 0.25),
    }


def test_the_identity_of_an_artifact_does_not_change(artifact: Artifact) -> None:
    before = identity(artifact.manifest)
    keep_drift(artifact, [measured("full_shared", 0.5)])
    assert identity(open_artifact(artifact.directory).manifest) == before


def test_an_update_removes_it(artifact: Artifact, tiny_llama: WrittenModel) -> None:
    keep_drift(artifact, [measured("full_shared", 0.5)])
    swapped = {**tiny_llama.adapters, "plan": tiny_llama.adapters["reflect"], "reflect": tiny_llama.adapters["plan"]}
    lragent.update(artifact.directory, tiny_llama.model_dir, swapped)
    assert not (artifact.directory / DRIFT).exists()


def test_it_does_not_count_for_other_adapters(artifact: Artifact, tiny_llama: WrittenModel) -> None:
    keep_drift(artifact, [measured("full_shared", 0.5)])
    kept = (artifact.directory / DRIFT).read_bytes()
    swapped = {**tiny_llama.adapters, "plan": tiny_llama.adapters["reflect"], "reflect": tiny_llama.adapters["plan"]}
    lragent.update(artifact.directory, tiny_llama.model_dir, swapped)
    (artifact.directory / DRIFT).write_bytes(kept)
    assert read_kept_drift(open_artifact(artifact.directory)) == {}


@pytest.mark.parametrize("change", ["kl", "{", "[]", "format"])
def test_a_changed_file_is_an_error(artifact: Artifact, change: str) -> None:
    keep_drift(artifact, [measured("full_shared", 0.5)])
    file = artifact.directory / DRIFT
    raw = json.loads(file.read_text())
    if change == "kl":
        raw["schemes"][0]["total"]["kl"] = 0.001
    file.write_text(change if change in "{[]" else json.dumps({**raw, "format": 2} if change == "format" else raw))
    with pytest.raises(ArtifactError, match=r"drift\.json (was changed|is damaged|has format).*\n.*Delete the file"):
        lragent.load(artifact.directory, backend="eager", kv_memory="1MiB")
