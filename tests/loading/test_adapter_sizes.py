"""An adapter that doesn't fit the base is refused for the true reason; a rounded copy of a base weight is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lragent.errors import AdapterError
from lragent.loading.model import load_directories
from tests.models import VOCAB, WrittenModel, quiet, write_model
from tests.models.variants import write_variants

FILE = "adapter_model.safetensors"
LARGER = VOCAB + 4
COPY = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    """A llama with adapters of which each holds weights of embedding or LM head."""
    configs = {
        "lora": {"target_modules": ["q_proj", "embed_tokens"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    }
    return write_variants(tmp_path_factory.mktemp("sizes"), "llama", configs)


def rewritten(source: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of an adapter with changed tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / FILE)
    save_file({key: change(key, tensor).contiguous() for key, tensor in tensors.items()}, target / FILE)
    return target


def test_empty_tensors_are_named_with_their_cause(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    empty = rewritten(tiny_llama.adapters["plan"], tmp_path / "plan", lambda key, tensor: torch.zeros(0))
    with pytest.raises(AdapterError, match=r"adapter plan .* is empty, its shape is \[0\]\nDeepSpeed ZeRO-3 .*gather"):
        load_directories(tiny_llama.model_dir, {"plan": empty})


def _with_more_tokens(key: str, tensor: Tensor) -> Tensor:
    for axis, size in enumerate(tensor.shape):
        if size == VOCAB:
            more = list(tensor.shape)
            more[axis] = LARGER - VOCAB
            return torch.cat([tensor, torch.ones(more)], axis)
    return tensor


@pytest.mark.parametrize(
    ("agent", "advice"),
    [
        ("saved", r"then model\.save_pretrained"),
        ("lora", r"then PeftModel\.from_pretrained.*unload\(\)\.save"),
        ("head", ""),
    ],
)
def test_an_enlarged_vocabulary_is_named_with_both_sizes(
    agent: str, advice: str, written: WrittenModel, tmp_path: Path
) -> None:
    larger = rewritten(written.adapters[agent], tmp_path / agent, _with_more_tokens)
    says = rf"adapter {agent} .* has {LARGER} tokens, the vocabulary of the base has {VOCAB}\n.*Resize the base first"
    with pytest.raises(AdapterError, match=rf"{says}.*resize_token_embeddings\({LARGER}\), {advice}"):
        load_directories(written.model_dir, {agent: larger})


def test_an_adapter_of_a_resized_base_fits_the_resized_base(written: WrittenModel, tmp_path: Path) -> None:
    larger = rewritten(written.adapters["saved"], tmp_path / "saved", _with_more_tokens)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(written.model_dir)
        model.resize_token_embeddings(LARGER)
        model.save_pretrained(tmp_path / "larger")
    loaded = load_directories(tmp_path / "larger", {"saved": larger})
    assert loaded.vocab_size == LARGER
    assert {len(rows["saved"].index) for rows in loaded.rows.values()} == {LARGER}


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rounded_copy_of_the_embedding_is_the_base(
    dtype: str, rounded: torch.dtype, written: WrittenModel, tmp_path: Path
) -> None:
    copied = rewritten(
        written.adapters["lora"], tmp_path / "lora", lambda key, tensor: tensor.to(rounded) if key == COPY else tensor
    )
    assert not torch.equal(load_file(copied / FILE)[COPY].float(), load_file(written.adapters["lora"] / FILE)[COPY])
    load_directories(written.model_dir, {"lora": copied}, dtype)


def test_a_trained_copy_of_the_embedding_is_not(written: WrittenModel, tmp_path: Path) -> None:
    def train(key: str, tensor: Tensor) -> Tensor:
        return tensor + 1e-3 * torch.randn_like(tensor) if key == COPY else tensor

    trained = rewritten(written.adapters["lora"], tmp_path / "lora", train)
    with pytest.raises(AdapterError, match="differs from the base weight"):
        load_directories(written.model_dir, {"lora": trained})


def test_an_adapter_on_single_experts_is_refused_for_that_reason(tmp_path: Path) -> None:
    written = write_model(tmp_path, "mixtral", targets="qv", layers=1)
    expert = "layers.0.block_sparse_moe.experts.1.w1"
    file = written.adapters["plan"] / FILE
    tensors = load_file(file)
    save_file({key.replace("layers.0.self_attn.q_proj", expert): tensor for key, tensor in tensors.items()}, file)
    says = rf"adapts model\.{expert}, whose weight this version of transformers joins with others into one parameter"
    with pytest.raises(AdapterError, match=rf"{says}, \S*experts\.gate_up_proj.*\nLeave such modules out"):
        load_directories(written.model_dir, written.adapters)
