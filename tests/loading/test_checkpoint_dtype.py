"""dtype="auto" is the checkpoint's: its config's or, without one, the most frequent in its weight files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lragent
from lragent.errors import ModelError
from lragent.loading.checkpoint_dtype import most_frequent_dtype, supported_dtype
from lragent.loading.model import load_directories
from tests.models import WrittenModel, quiet

FAST, SLOW = {"avx512_fp16": True}, {"avx512_fp16": False, "avx512_bf16": True}


@pytest.fixture
def model_dir(tiny_llama: WrittenModel, tmp_path: Path) -> Path:
    """A copy in bfloat16 that a test may rewrite."""
    target = tmp_path / "model"
    shutil.copytree(tiny_llama.model_dir, target)
    with quiet():
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).save_pretrained(target)
    return target


def configure(model_dir: Path, **settings: object) -> None:
    """Changes config.json; None removes an entry."""
    file = model_dir / "config.json"
    config = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_adapters_have_the_dtype_of_the_checkpoint(model_dir: Path, tiny_llama: WrittenModel) -> None:
    loaded = load_directories(model_dir, tiny_llama.adapters)
    assert loaded.dtype == torch.bfloat16 and loaded.notes == ()
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for w in loaded.lora.values() for pair in w.values() for t in (pair.a, pair.b)} == {torch.bfloat16}
    assert lragent.inspect(model_dir, tiny_llama.adapters).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"dtype": "float32"}, torch.float32),  # the config wins over the files
        ({"dtype": None, "torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "torch_dtype": "float16"}, torch.float32),  # as transformers reads both
        ({"dtype": None}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_config_says_it_or_else_the_files(
    settings: dict[str, object], dtype: torch.dtype, model_dir: Path, tiny_llama: WrittenModel
) -> None:
    configure(model_dir, **settings)
    assert load_directories(model_dir, {}).dtype == dtype


def test_most_numbers_decide_and_not_most_tensors(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    wide = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    wide |= {f"small.{i}": torch.zeros(1) for i in range(100)}
    save_file(wide | {"counts": torch.zeros(10**6, dtype=torch.int64)}, model_dir / "model.safetensors")
    save_file({"a": torch.zeros(10**6)}, model_dir / "adapter_model.safetensors")  # not a part of the model
    assert most_frequent_dtype(model_dir) == torch.bfloat16
    save_file({"a": torch.zeros(10**6)}, model_dir / "model-00002-of-00002.safetensors")
    assert most_frequent_dtype(model_dir) == torch.float32


def test_a_damaged_file_is_named(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        most_frequent_dtype(model_dir)


def test_a_folder_without_safetensors_has_no_dtype(tmp_path: Path) -> None:
    assert most_frequent_dtype(tmp_path) is None


def test_float16_needs_a_cpu_that_computes_in_it() -> None:
    assert supported_dtype(torch.float16, FAST) == (torch.float16, "")
    dtype, note = supported_dtype(torch.float16, SLOW)
    assert dtype == torch.bfloat16 and "float16" in note and "become bfloat16" in note
    assert supported_dtype(torch.bfloat16, SLOW) == (torch.bfloat16, "")
    dtype, note = supported_dtype(torch.float64, FAST)
    assert dtype == torch.float32 and "float64, which is not supported" in note


def test_the_report_says_so_if_float16_became_bfloat16(
    model_dir: Path, tiny_llama: WrittenModel, tmp_path: Path
) -> None:
    configure(model_dir, dtype="float16")
    expected, note = supported_dtype(torch.float16, torch.cpu.get_capabilities())
    report = lragent.convert(model_dir, tiny_llama.adapters, tmp_path / "m.lragent", compiled=False)
    assert report.notes == ((note,) if note else ())
    assert lragent.inspect(tmp_path / "m.lragent").dtype == str(expected).removeprefix("torch.")
    assert load_directories(model_dir, {}, "float16").dtype == torch.float16
