"""Hub ids: found in a cache laid out as the hub's, without a network, in a process with the hub's own settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from lragent.loading.hub import ADAPTER_FILES, MODEL_FILES, locate_adapter, locate_model
from tests.models import WrittenModel

OLD, NEW = "1" * 40, "2" * 40
SCRIPT = """
import json, os, sys
from pathlib import Path
from typer.testing import CliRunner
import lragent
from lragent.artifact.manifest import read_manifest
from lragent.errors import UserError
from lragent_cli.main import app

cache, out = map(Path, sys.argv[1:])
found = {}

def error_of(call):
    try:
        call()
    except UserError as error:
        return f"{type(error).__name__}: {error}"

def engine(sharing):
    return lragent.load(out, sharing=sharing, backend="eager", kv_memory="4MiB")

adapters = {"plan": "org/plan"}
arguments = ["convert", "org/tiny", "--adapters", "plan=org/plan@v2", "-o", str(out), "--layouts", "none"]
found["printed"] = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
found["sources"] = read_manifest(out).sources
(cache / "models--org--tiny/refs/main").write_text("2" * 40)  # main moves to a commit without a model
options = {"prompts": ["one"], "schemes": ["non_shared"], "new_tokens": 2, "engine_for": engine}
found["equal"] = lragent.verify(out, "org/tiny", adapters, **options).equal
lragent.update(out, "org/tiny", {"plan": "org/plan@v2"})
found["updated"] = read_manifest(out).sources
found["moved"] = error_of(lambda: lragent.inspect("org/tiny", {}))
found["newest"] = error_of(lambda: lragent.update(out, "org/tiny", adapters))
found["unknown"] = error_of(lambda: lragent.inspect("org/none", {}))
found["revision"] = error_of(lambda: lragent.inspect("org/tiny@v9", {}))
found["adapter"] = error_of(lambda: lragent.inspect("org/tiny@" + "1" * 40, {"plan": "org/none"}))
print(json.dumps(found))
"""


def cached(cache: Path, repository: str, source: Path, refs: dict[str, str]) -> None:
    """Lays out a repository as the hub's cache does; `source` is the content of the commit OLD."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / OLD)
    (folder / "snapshots" / NEW).mkdir()
    for name, commit in refs.items():
        file = folder / "refs" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(commit)


@pytest.fixture(scope="module")
def found(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of SCRIPT, which uses the cache only."""
    directory = tmp_path_factory.mktemp("hub")
    cached(directory / "cache", "org/tiny", tiny_llama.model_dir, {"main": OLD})
    cached(directory / "cache", "org/plan", tiny_llama.adapters["plan"], {"main": NEW, "v2": OLD})
    environment = {**os.environ, "HF_HUB_CACHE": str(directory / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, directory / "cache", directory / "m.lragent"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_manifest_pins_commits(found: Any) -> None:
    pins = {"base": f"org/tiny@{OLD}", "plan": f"org/plan@{OLD}"}
    assert found["sources"] == found["updated"] == pins
    assert found["printed"].startswith("wrote ")


def test_verify_and_update_take_the_pinned_commit_and_others_the_newest(found: Any) -> None:
    assert found["equal"] is True
    assert found["moved"].startswith("ModelError") and f"snapshots/{NEW} has no config.json" in found["moved"]
    assert f"snapshots/{NEW} has no adapter_config.json" in found["newest"]


def test_an_id_that_can_not_be_had_is_an_error_with_a_reason(found: Any) -> None:
    for name in ("unknown", "revision"):
        assert found[name].startswith("ModelError: model: there is no folder org/"), found[name]
        assert "not in the cache" in found[name] and "HF_HUB_OFFLINE" in found[name]
    assert found["adapter"].startswith("AdapterError: adapter plan: there is no folder org/none")


REPOSITORY = (
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
LEFT_OUT = (
    "modeling_own.py", "tokenization_own.py", "README.md", "consolidated.safetensors", "onnx/model.onnx",
    "original/consolidated.00.pth", "pytorch_model-00001-of-00002.bin", "model.Q4_K_M.gguf", "training_args.bin",
)  # fmt: skip


def test_weights_config_and_tokenizer_are_downloaded_and_nothing_else() -> None:
    patterns = [*MODEL_FILES.known, *MODEL_FILES.weights]
    assert tuple(filter_repo_objects([*REPOSITORY, *LEFT_OUT], allow_patterns=patterns)) == REPOSITORY
    adapter = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    patterns = [*ADAPTER_FILES.known, *ADAPTER_FILES.weights]
    assert tuple(filter_repo_objects([*adapter, "optimizer.pt", "x.py"], allow_patterns=patterns)) == adapter


def test_an_existing_path_wins_and_other_paths_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert locate_model("org/tiny").path == Path("org/tiny")
    assert locate_adapter("plan", "~/org/tiny").path == tmp_path / "org" / "tiny"
    for nowhere in ("./org/plan", "../org/plan", "/org/plan", "plan", "a/b/c", "org/plan/"):
        assert locate_model(nowhere).path == Path(nowhere)
        assert locate_model(nowhere).pin == ""
