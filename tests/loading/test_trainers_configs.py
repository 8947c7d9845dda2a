"""Configs as trainers and authors leave them: code of their own is never run, and a wished attention is not needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lragent.errors import ModelError
from lragent.loading.model import load_directories
from lragent.reports.roofline import shape_of_model
from tests.models import WrittenModel

OWN = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


@pytest.fixture
def model_dir(tiny_llama: WrittenModel, tmp_path: Path) -> Path:
    """A copy with code, which leaves the file "ran" beside the model when it is run."""
    target = tmp_path / "model"
    shutil.copytree(tiny_llama.model_dir, target)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig as OwnConfig\n"
    (target / "configuration_own.py").write_text(code)
    (target / "modeling_own.py").write_text("from transformers import LlamaForCausalLM as OwnForCausalLM\n")
    return target


def configure(model_dir: Path, **settings: object) -> None:
    file = model_dir / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_model_with_code_of_its_own_is_refused(model_dir: Path, tiny_llama: WrittenModel) -> None:
    configure(model_dir, model_type="own", auto_map=OWN)
    says = r"needs Python code that comes with the model .* never run\nUse a model type that transformers has"
    with pytest.raises(ModelError, match=says):
        load_directories(model_dir, tiny_llama.adapters)
    with pytest.raises(ModelError, match=says):
        shape_of_model(model_dir, 1, 1)
    assert not (model_dir.parent / "ran").exists()


def test_nobody_is_asked(model_dir: Path) -> None:
    configure(model_dir, model_type="own", auto_map=OWN)
    script = "from lragent_cli.main import main; main()"
    command = [sys.executable, "-c", script, "roofline", model_dir]
    done = subprocess.run(command, capture_output=True, text=True, input="y\n")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {model_dir} needs Python code") and "trust_remote_code" not in done.stderr
    assert not (model_dir.parent / "ran").exists()


def test_code_beside_a_model_type_that_transformers_has_is_not_needed(
    model_dir: Path, tiny_llama: WrittenModel
) -> None:
    configure(model_dir, auto_map=OWN)
    loaded = load_directories(model_dir, tiny_llama.adapters)
    assert type(loaded.model).__module__.startswith("transformers.")
    assert not (model_dir.parent / "ran").exists()


@pytest.mark.parametrize("wish", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
def test_an_attention_that_the_config_asks_for_is_not_needed(
    wish: str, model_dir: Path, tiny_llama: WrittenModel
) -> None:
    plain = load_directories(model_dir, tiny_llama.adapters)
    configure(model_dir, attn_implementation=wish, _attn_implementation=wish, use_cache=False)
    loaded = load_directories(model_dir, tiny_llama.adapters)
    assert loaded.agents == plain.agents and loaded.dtype == torch.float32
    shape_of_model(model_dir, 1, 1)
