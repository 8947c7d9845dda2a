"""Adapter files as older versions of PEFT and tools around it wrote them give the weights that PEFT reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lragent.errors import AdapterError
from lragent.loading.model import load_directories
from tests.models import WrittenModel, quiet
from tests.oracle.peft_oracle import load_plain

WEIGHTS, OLD_WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


@pytest.fixture
def adapter(tiny_llama: WrittenModel, tmp_path: Path) -> Path:
    """A copy that a test may rewrite."""
    return Path(shutil.copytree(tiny_llama.adapters["plan"], tmp_path / "plan"))


def _renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        save_file({rename(key): tensor for key, tensor in tensors.items()}, directory / WEIGHTS)

    return change


def _as_bin(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / OLD_WEIGHTS)
    (directory / WEIGHTS).unlink()


def _first_config(directory: Path) -> None:
    """The settings that the first versions of PEFT knew."""
    config = json.loads((directory / CONFIG).read_text())
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
            "lora_dropout", "modules_to_save", "peft_type", "r", "target_modules", "task_type")  # fmt: skip
    (directory / CONFIG).write_text(json.dumps({key: config[key] for key in kept}))


def _later_config(directory: Path) -> None:
    config = json.loads((directory / CONFIG).read_text())
    later = {"from_another_tool": True, "setting_of_tomorrow": {"a": 1}, "off_of_tomorrow": None}
    (directory / CONFIG).write_text(json.dumps({**config, **later}))


FORMS: dict[str, Callable[[Path], None]] = {
    "as PEFT saves it": lambda directory: None,
    "no prefix": _renamed(lambda key: key.removeprefix("base_model.model.")),
    "prefix twice": _renamed(lambda key: f"base_model.model.{key}"),
    "adapter name": _renamed(lambda key: key.replace(".weight", ".default.weight")),
    "other adapter name": _renamed(lambda key: key.replace(".weight", ".my-role.weight")),
    "compiled": _renamed(lambda key: f"_orig_mod.{key}"),
    "compiled inside": _renamed(lambda key: key.replace(".model.layers", ".model._orig_mod.layers")),
    "fsdp": _renamed(lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module.")),
    "bin": _as_bin,
    "first config": _first_config,
    "later config": _later_config,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_that_peft_reads(form: str, adapter: Path, tiny_llama: WrittenModel) -> None:
    with quiet():
        peft = PeftModel.from_pretrained(load_plain(tiny_llama.model_dir, torch.float32), str(adapter))
    FORMS[form](adapter)
    loaded = load_directories(tiny_llama.model_dir, {"plan": adapter})
    layers = {name: m for name, m in peft.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(loaded.lora) == set(layers)
    for name, layer in layers.items():
        weights = loaded.lora[name]["plan"]
        assert torch.equal(weights.a, layer.lora_A["default"].weight)
        assert torch.equal(weights.b, layer.lora_B["default"].weight)
        assert weights.scaling == layer.scaling["default"]


def test_a_bin_file_runs_nothing(adapter: Path, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (adapter / WEIGHTS).unlink()
    torch.save({"x": Run()}, adapter / OLD_WEIGHTS)
    with pytest.raises(AdapterError, match="can't be read as tensors only"):
        load_directories(tiny_llama.model_dir, {"plan": adapter})
    assert not (tmp_path / "ran").exists()


def test_unknown_settings_are_named(adapter: Path, tiny_llama: WrittenModel, caplog: pytest.LogCaptureFixture) -> None:
    _later_config(adapter)
    load_directories(tiny_llama.model_dir, {"plan": adapter})
    assert "settings unknown to the installed PEFT are ignored: from_another_tool, setting_of_tomorrow" in caplog.text


def _setting(**settings: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **settings}))

    return change


def _first_tensor(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(directory / WEIGHTS).items()}
        change(tensors, min(tensors))
        save_file(tensors, directory / WEIGHTS)

    return rewrite


BROKEN = {
    "alpha": (_setting(lora_alpha=float("nan")), "has infinite values or NaN as its scaling"),
    "pattern": (_setting(target_modules="("), "unterminated subpattern"),
    "import": (_setting(megatron_config={"a": 1}), "No module named 'megatron'"),
    "rank": (_setting(r=3), r"size mismatch for \S+q_proj"),
    "saved": (_setting(modules_to_save=["lm_head"]), r"has no weights for \S*lm_head\.weight"),
    "nan": (_first_tensor(lambda tensors, key: tensors[key][0].fill_(float("nan"))), "or NaN as its lora_A"),
    "twice": (
        _first_tensor(lambda tensors, key: tensors.update({key.removeprefix("base_model.model."): tensors[key] + 1})),
        r"has \S+\.lora_A twice",
    ),
    "whole numbers": (
        _first_tensor(lambda tensors, key: tensors.update({key: tensors[key].long()})),
        r"holds torch\.int64",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(what: str, adapter: Path, tiny_llama: WrittenModel) -> None:
    change, found = BROKEN[what]
    change(adapter)
    with pytest.raises(AdapterError, match=rf"^adapter plan\b.*{found}"):
        load_directories(tiny_llama.model_dir, {"plan": adapter})
