"""load: each kind of bad input has its own error, which names what was found and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lragent.errors import AdapterError, ModelError, RequestError
from lragent.loading import load_directories, load_live
from tests.models import WrittenModel, write_model
from tests.passes.tiny_lm import Tiny


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
        (lambda d: _edit(d, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda d: _edit(d, use_dora=True), "use_dora=True.*DoRA is not supported"),
        (lambda d: _edit(d, bias="all"), "trained biases are not supported"),
        (lambda d: _edit(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: _edit(d, base_model_name_or_path="org/other-base"), "different base models.*action: other-base"),
    ],
    ids=["no-dir", "no-config", "json", "no-weights", "truncated", "kind", "dora", "bias", "saved", "base"],
)
def test_damaged_adapter(written: WrittenModel, damage: Callable[[Path], None], says: str) -> None:
    for path in written.adapters.values():
        _edit(path, base_model_name_or_path="org/tiny-base")
    damage(written.adapters["action"])
    with pytest.raises(AdapterError, match=says):
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
    with pytest.raises(AdapterError, match=r"has shape \[8, 192\], but .* needs 96 there"):
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


def test_adapter_on_an_embedding_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"module embed is adapted as Embedding"):
        load_live(Tiny(targets=("embed", "gamma")).build())
