"""Facts of tuning in an adapter's file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lragent
from lragent.artifact.directory import open_artifact
from lragent.errors import AdapterError
from lragent.loading.tuned_metadata import Tuned, metadata_of, tuned_for
from tests.models import WrittenModel

TUNED = Tuned("full_shared", "plan", {"plan": "d" * 64}, "float32", 3, "0.1.0")


def with_metadata(folder: Path, out: Path, metadata: dict[str, str]) -> Path:
    shutil.copytree(folder, out)
    weights = out / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata=metadata)
    return out


def test_the_scheme_reaches_the_artifact(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    plan = with_metadata(tiny_llama.adapters["plan"], tmp_path / "plan", metadata_of(TUNED))
    assert (tuned_for("plan", plan), tuned_for("plan", tiny_llama.adapters["plan"])) == ("full_shared", "")
    adapters = {**tiny_llama.adapters, "plan": plan}
    lragent.convert(tiny_llama.model_dir, adapters, tmp_path / "m.lragent", compiled=False)
    agents = open_artifact(tmp_path / "m.lragent").manifest.agents
    assert [agent.tuned_for for agent in agents] == ["full_shared", "", ""]
    lragent.update(tmp_path / "m.lragent", tiny_llama.model_dir, tiny_llama.adapters)
    assert {agent.tuned_for for agent in open_artifact(tmp_path / "m.lragent").manifest.agents} == {""}


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"scheme": "full_shared"})])
def test_a_damaged_entry_is_an_error(tiny_llama: WrittenModel, tmp_path: Path, text: str) -> None:
    plan = with_metadata(tiny_llama.adapters["plan"], tmp_path / "plan", {"format": "pt", "lragent": text})
    with pytest.raises(AdapterError, match="adapter plan: the entry 'lragent' in the metadata of"):
        tuned_for("plan", plan)


def test_an_older_format_has_no_metadata(tmp_path: Path) -> None:
    assert tuned_for("plan", tmp_path) == ""
