"""load: each kind of bad input has its own error, which names what was found and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lragent.errors import AdapterError, ModelError, RequestError
from lragent.loading.model import load_directories, load_live
from tests.models import WrittenModel, quiet, write_model
from tests.models.variants import train_randomly, write_variants
from tests.passes.tiny_lm import Tiny, TinyConfig, TinyLM


@pytest.fixture
def written(tiny_llama: WrittenModel, tmp_path: Path) -> WrittenModel:
    """A copy that a test may damage."""
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_llama.model_dir, model_dir)
    adapters = {name: tmp_path / name for name in tiny_llama.adapters}
    for name, path in adapters.items():
        shutil.copytree(tiny_llama.adapters[name], path)
    return WrittenModel(model_dir, adapters)


def test_agents_with_their_ranks_targets_and_digests(written: WrittenModel) -> None:
    loaded = load_directories(written.model_dir, written.adapters)
    assert [(a.name, a.rank) for a in loaded.agents] == [("plan", 4), ("action", 8), ("reflect", 4)]
    assert len({a.digest for a in loaded.agents}) == 3
    again = load_directories(written.model_dir, {"other": written.adapters["plan"]})
    assert again.agents[0].digest == loaded.agents[0].digest  # of the weights, not of the name


def test_a_model_without_adapters_loads(written: WrittenModel) -> None:
    assert load_directories(written.model_dir, {}).agents == ()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: shutil.rmtree(d), "no model directory at"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "can't load a causal LM"),
        (lambda d: (d / "model.safetensors").unlink(), "can't load a causal LM"),
        (lambda d: _truncate(d / "model.safetensors"), "can't load a causal LM"),
    ],
    ids=["no-dir", "no-config", "bad-config", "no-weights", "truncated"],
)
def test_damaged_model(written: WrittenModel, damage: Callable[[Path], None], says: str) -> None:
    damage(written.model_dir)
    with pytest.raises(ModelError, match=says):
        load_directories(written.model_dir, written.adapters)


def test_model_that_lacks_a_weight(written: WrittenModel) -> None:
    file = written.model_dir / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, model\.norm\.weight"):
        load_directories(written.model_dir, written.adapters)


def _edit(directory: Path, **changes: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: shutil.rmtree(d), "adapter action: no directory at"),
        (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda d: _truncate(d / "adapter_model.safetensors"), "is damaged"),
        (lambda d: _edit(d, use_dora=True), r"has no weights for .*lora_magnitude_vector"),
        # Some versions of transformers fail in PEFT; with others we see that the weight is missing.
        (
            lambda d: _edit(d, modules_to_save=["lm_head"]),
            "adapter action: (PEFT can't load|.* has no weights for) .*lm_head",
        ),
        (lambda d: _edit(d, target_modules=["q_proj"]), "has weights .*k_proj.*, which its config does not mention"),
    ],
    ids=["no-dir", "no-config", "json", "no-weights", "truncated", "no-dora", "no-saved", "more-weights"],
)
def test_damaged_adapter(written: WrittenModel, damage: Callable[[Path], None], says: str) -> None:
    damage(written.adapters["action"])
    with pytest.raises(AdapterError, match=says):
        load_directories(written.model_dir, written.adapters)


@pytest.mark.parametrize("kind", ["IA3", "VERA", "LOHA", "LOKR", "PREFIX_TUNING", "PROMPT_TUNING", "ADALORA", "OFT"])
def test_other_kinds_of_adapters_are_refused(written: WrittenModel, kind: str) -> None:
    _edit(written.adapters["action"], peft_type=kind)
    with pytest.raises(AdapterError, match=rf"adapter action: peft_type is '{kind}'.*\n.*train the role as LoRA"):
        load_directories(written.model_dir, written.adapters)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("alora_invocation_tokens", [5, 6], r"activated LoRA.*\n.*without invocation tokens"),
        (
            "target_parameters",
            ["mlp.experts.down_proj"],
            r"bare parameters, such as fused experts.*\nMerge the adapter",
        ),
        ("layer_replication", [[0, 2]], r"layer replication.*\nTrain the adapter without it"),
        ("use_qalora", True, "QA-LoRA"),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}, "BD-LoRA"),
        ("arrow_config", {"top_k": 2}, r"Arrow routing.*\nUse the experts"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("velora_config", {"num_groups": 2}, "VeLoRA"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("init_lora_weights", "pissa", r"'pissa' .* changes the base weights.*\n.*path_initial_model"),
        ("init_lora_weights", "olora", "changes the base weights"),
        ("init_lora_weights", "loftq", "changes the base weights"),
    ],
    ids=str,
)
def test_refused_settings_name_adapter_and_remedy(
    written: WrittenModel, setting: str, value: object, says: str
) -> None:
    _edit(written.adapters["action"], **{setting: value})
    with pytest.raises(AdapterError, match=rf"adapter action: {setting}=.*{says}"):
        load_directories(written.model_dir, written.adapters)


@pytest.mark.parametrize("setting", ["alora_invocation_tokens", "target_parameters", "layer_replication"])
def test_settings_that_are_off_are_not_refused(written: WrittenModel, setting: str) -> None:
    _edit(written.adapters["action"], **{setting: None}, init_lora_weights="gaussian")
    assert len(load_directories(written.model_dir, written.adapters).agents) == 3


def test_a_saved_module_that_is_no_linear_layer(tmp_path: Path) -> None:
    written = write_variants(tmp_path, "llama", {"plan": {"modules_to_save": ["norm"]}})
    with pytest.raises(AdapterError, match=r"adapter plan: module .*norm \(LlamaRMSNorm\) is in modules_to_save\n"):
        load_directories(written.model_dir, written.adapters)


def test_a_trained_bias_of_a_module_without_adapter(tmp_path: Path) -> None:
    written = write_variants(tmp_path, "qwen2", {"plan": {"bias": "all", "target_modules": ["q_proj", "v_proj"]}})
    with pytest.raises(AdapterError, match=r"adapter plan trained the bias of .*k_proj.*\n.*lora_only"):
        load_directories(written.model_dir, written.adapters)


def test_a_copy_of_a_base_weight_must_be_the_base(tmp_path: Path) -> None:
    written = write_variants(tmp_path, "llama", {"plan": {"target_modules": ["q_proj", "embed_tokens"]}})
    load_directories(written.model_dir, written.adapters)
    file = written.adapters["plan"] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"adapter plan .*embed_tokens.* differs from the base weight"):
        load_directories(written.model_dir, written.adapters)


def test_a_quantised_base_is_refused(written: WrittenModel) -> None:
    file = written.model_dir / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    with pytest.raises(ModelError, match=r"is quantised\nConvert from the unquantised checkpoint"):
        load_directories(written.model_dir, written.adapters)


def test_adapter_of_another_architecture(written: WrittenModel, tmp_path: Path) -> None:
    other = write_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(AdapterError, match=r"adapter action .* adapts module transformer\.h\.0"):
        load_directories(written.model_dir, {**written.adapters, "action": other.adapters["action"]})


def test_adapter_of_a_base_with_other_sizes(written: WrittenModel) -> None:
    file = written.adapters["action"] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = torch.cat([tensors[name], tensors[name]], 1)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"has shape \[8, 192\], but .* has 96 input features"):
        load_directories(written.model_dir, written.adapters)


@pytest.mark.parametrize(("name", "says"), [("base", "reserved"), ("a b", "characters other than"), ("", "characters")])
def test_agent_names(written: WrittenModel, name: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load_directories(written.model_dir, {name: written.adapters["plan"]})


def test_unknown_dtype(written: WrittenModel) -> None:
    with pytest.raises(RequestError, match="unknown dtype 'int4'"):
        load_directories(written.model_dir, written.adapters, dtype="int4")


def test_live_model_with_merged_adapters() -> None:
    model = Tiny().build()
    model.merge_adapter()
    with pytest.raises(AdapterError, match="has a merged adapter"):
        load_live(model)
    model.unmerge_adapter()
    assert [a.name for a in load_live(model).agents] == ["plan", "action"]


def test_live_model_with_trained_biases() -> None:
    model = Tiny().build()
    model.peft_config["plan"].bias = "lora_only"
    with pytest.raises(AdapterError, match=r"adapter plan: bias='lora_only'.*\nSave the adapter"):
        load_live(model)


def test_an_adapted_module_of_another_kind_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"module conv is adapted as Conv1d.*\n.*linear layers and embeddings"):
        load_live(_tiny_with_convolution())


def _tiny_with_convolution() -> Any:
    base = TinyLM(TinyConfig())
    base.conv = torch.nn.Conv1d(2, 2, 1)
    return get_peft_model(base, LoraConfig(target_modules=["gamma", "conv"]))


def test_loading_a_live_model_leaves_it_as_it_was() -> None:
    model = Tiny().build()
    before = [name for name, _ in model.named_modules()]
    load_live(model)
    assert [name for name, _ in model.named_modules()] == before


def test_a_weighted_adapter_is_an_adapter_like_others() -> None:
    model = Tiny(ranks={"plan": 4, "action": 4}).build()
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["plan", "action"], [0.7, 0.5], kind, combination_type=kind)
    loaded = load_live(model)
    assert [(a.name, a.rank) for a in loaded.agents][2:] == [("cat", 8), ("linear", 4), ("svd", 4)]
    weights = loaded.lora["blocks.0.alpha"]
    both = sum(f * weights[n].scaling * weights[n].b @ weights[n].a for n, f in (("plan", 0.7), ("action", 0.5)))
    found = weights["cat"].scaling * weights["cat"].b @ weights["cat"].a
    assert torch.allclose(found, torch.as_tensor(both), atol=1e-5)


def test_a_live_model_whose_saved_embedding_peft_ties(tmp_path: Path) -> None:
    written = write_variants(tmp_path, "llama", {}, tied=True)
    tied = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    plain, saved = (LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **more) for more in ({}, tied))
    with quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(written.model_dir), plain, adapter_name="plain")
        model.add_adapter("saved", saved)
        model.set_adapter("saved")
        train_randomly(model)
    loaded = load_live(model)
    assert {module: list(rows) for module, rows in loaded.rows.items()} == {
        "model.embed_tokens": ["saved"],
        "lm_head": ["saved"],
    }
    embedding = loaded.rows["model.embed_tokens"]["saved"].weight
    assert torch.equal(embedding, loaded.rows["lm_head"]["saved"].weight)
    ids = torch.tensor([[5, 9, 30]])
    assert torch.equal(model.get_base_model().model.embed_tokens(ids)[0], embedding[ids[0]])
