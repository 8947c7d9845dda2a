"""Adapters with names of another time or place: modules that transformers renamed, bases of other names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from lragent.errors import AdapterError
from lragent.loading.model import load_directories
from tests.models import WrittenModel, quiet
from tests.models.variants import train_randomly

FILE = "adapter_model.safetensors"
NOW, BEFORE = "model.language_model.layers", "language_model.model.layers"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    """A Gemma 3 with a vision part, which transformers builds with other module names than its first versions did."""
    directory = tmp_path_factory.mktemp("gemma")
    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        config = AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=vision, image_token_index=127, mm_tokens_per_image=4
        )
        Gemma3ForConditionalGeneration(config).save_pretrained(directory / "model")
        base = AutoModelForCausalLM.from_pretrained(directory / "model")
        targets = r".*language_model.*\.(q_proj|v_proj)"
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        train_randomly(model)
        model.save_pretrained(directory / "plan")
    return WrittenModel(directory / "model", {"plan": directory / "plan"})


def renamed(written: WrittenModel, target: Path, rename: Callable[[str], str]) -> WrittenModel:
    """The model with a copy of its adapter whose keys are renamed."""
    shutil.copytree(written.adapters["plan"], target)
    tensors = load_file(target / FILE)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, target / FILE)
    return WrittenModel(written.model_dir, {"plan": target})


def test_keys_of_an_older_transformers_are_those_that_peft_reads(gemma: WrittenModel, tmp_path: Path) -> None:
    older = renamed(gemma, tmp_path / "plan", lambda key: key.replace(NOW, BEFORE))
    assert all(BEFORE in key for key in load_file(older.adapters["plan"] / FILE))
    found = load_directories(older.model_dir, older.adapters)
    assert found.agents == load_directories(gemma.model_dir, gemma.adapters).agents  # digests are of all weights
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(gemma.model_dir)
        peft = PeftModel.from_pretrained(base, str(older.adapters["plan"])).get_base_model()
    for name, by_agent in found.lora.items():
        assert torch.equal(by_agent["plan"].b, peft.get_submodule(name).lora_B["default"].weight)


def test_a_key_that_no_version_had_is_still_refused(gemma: WrittenModel, tmp_path: Path) -> None:
    other = renamed(gemma, tmp_path / "plan", lambda key: key.replace(NOW, "elsewhere.layers"))
    with pytest.raises(AdapterError, match=r"adapts module elsewhere\.layers\.0\.self_attn.*\n.*another architecture"):
        load_directories(other.model_dir, other.adapters)


HUB_ID = "org/Tiny-1B-Instruct"
BASES = {
    "hub id": (HUB_ID, ""),
    "upper case": (HUB_ID.upper(), ""),
    "hub's cache": ("/root/.cache/huggingface/hub/models--org--Tiny-1B-Instruct/snapshots/92131767", ""),
    "own folder": ("/data/models/my-base", ""),
    "nothing": (None, ""),
    "copy in 4 bits": ("other/tiny-1b-instruct-bnb-4bit", "(plan: org/Tiny-1B-Instruct, action: other/tiny-1b"),
    "another model": ("org/Tiny-1B", "(plan: org/Tiny-1B-Instruct, action: org/Tiny-1B)"),
}


@pytest.mark.parametrize("name", BASES)
def test_names_of_bases_give_a_note_at_most(name: str, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    base, says = BASES[name]
    adapters = {}
    for agent, value in (("plan", HUB_ID), ("action", base)):
        adapters[agent] = Path(shutil.copytree(tiny_llama.adapters[agent], tmp_path / agent))
        file = adapters[agent] / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": value}))
    loaded = load_directories(tiny_llama.model_dir, adapters)
    assert [agent.name for agent in loaded.agents] == ["plan", "action"]
    assert len(loaded.notes) == (1 if says else 0)
    assert not says or ("name different base models" in loaded.notes[0] and says in loaded.notes[0])
