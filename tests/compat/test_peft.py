"""One test per private API of PEFT; it fails by name if the API changes. Each function equals what PEFT computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lragent.compat import peft as compat

NAME = "default"
FEATURES, RANK, VOCAB = 6, 2, 9


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, FEATURES)
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, VOCAB)
        self.conv = nn.Conv1d(FEATURES, FEATURES, 1)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.linear(self.embed(ids)))
        return out


def adapted(**options: Any) -> Any:
    """The base model inside a PEFT model whose adapter weights are random."""
    torch.manual_seed(0)
    config = LoraConfig(**({"r": RANK, "lora_alpha": 6, "target_modules": ["linear"]} | options))
    model = get_peft_model(Base(), config)
    for name, parameter in model.named_parameters():
        if "lora" in name or "trainable_tokens" in name or "modules_to_save" in name:
            nn.init.normal_(parameter.data)
    return model.get_base_model()


@pytest.fixture(scope="module")
def linear() -> Any:
    return adapted().linear


def delta(wrapper: Any) -> Tensor:
    """Scaling B A `[out, in]`."""
    matrices = compat.lora_matrices(wrapper, NAME)
    assert matrices is not None
    return compat.lora_scaling(wrapper, NAME) * matrices[1] @ matrices[0]


def test_base_tuner_layer_auxiliary_training_wrapper() -> None:
    """peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper"""
    model = adapted(modules_to_save=["head"], trainable_token_indices={"embed": [1]})
    assert all(map(compat.is_wrapper, (model.linear, model.head, model.embed)))
    assert not compat.is_wrapper(model.conv) and not compat.is_wrapper(model.linear.base_layer)


def test_kinds() -> None:
    """peft.tuners.lora.Linear, .Embedding; peft.utils.other.ModulesToSaveWrapper, .TrainableTokensWrapper"""
    model = adapted(modules_to_save=["head"], trainable_token_indices={"embed": [1]}, target_modules=["linear", "conv"])
    assert compat.kind_of(model.linear) == "lora"
    assert compat.kind_of(model.head) == "saved_module"
    assert compat.kind_of(model.embed) == "token_rows"
    assert compat.is_wrapper(model.conv) and compat.kind_of(model.conv) is None
    assert compat.kind_of(adapted(target_modules=["embed"]).embed) == "lora"


def test_base_layer_original_module() -> None:
    """base_layer, original_module, token_adapter.base_layer"""
    model = adapted(modules_to_save=["head"], trainable_token_indices={"embed": [1]})
    torch.manual_seed(0)
    plain = Base()
    for name in ("linear", "head", "embed"):
        wrapper, expected = getattr(model, name), getattr(plain, name)
        kind = compat.kind_of(wrapper)
        assert kind is not None
        base = compat.base_module(wrapper, kind)
        assert type(base) is type(expected) and torch.equal(base.weight, expected.weight)


def test_merged() -> None:
    """merged of LoRA layers and of TrainableTokensWrapper.token_adapter"""
    model = adapted(modules_to_save=["head"], trainable_token_indices={"embed": [1]})
    assert not compat.is_merged(model.linear, "lora") and not compat.is_merged(model.embed, "token_rows")
    model.linear.merge()
    model.embed.token_adapter.merge()
    assert compat.is_merged(model.linear, "lora") and compat.is_merged(model.embed, "token_rows")
    assert not compat.is_merged(model.head, "saved_module")


def test_lora_a_lora_b(linear: Any) -> None:
    """lora_A, lora_B"""
    matrices = compat.lora_matrices(linear, NAME)
    assert matrices is not None
    a, b, bias = matrices
    assert a.shape == (RANK, FEATURES) and b.shape == (FEATURES, RANK) and bias is None
    torch.testing.assert_close(delta(linear), linear.get_delta_weight(NAME))
    assert compat.lora_matrices(linear, "other") is None


def test_lora_b_bias() -> None:
    """lora_B.bias"""
    wrapper = adapted(lora_bias=True).linear
    matrices = compat.lora_matrices(wrapper, NAME)
    assert matrices is not None and matrices[2] is not None
    x = torch.ones(1, FEATURES)
    expected = wrapper.base_layer(x) + x @ delta(wrapper).T + compat.lora_scaling(wrapper, NAME) * matrices[2]
    torch.testing.assert_close(wrapper(x), expected)


def test_lora_embedding_a_lora_embedding_b() -> None:
    """lora_embedding_A, lora_embedding_B"""
    wrapper = adapted(target_modules=["embed"]).embed
    ids = torch.arange(VOCAB)
    torch.testing.assert_close(wrapper(ids), wrapper.base_layer(ids) + delta(wrapper).T)
    assert compat.lora_matrices(wrapper, "other") is None


def test_scaling(linear: Any) -> None:
    """scaling"""
    assert compat.lora_scaling(linear, NAME) == 3.0
    x = torch.ones(1, FEATURES)
    torch.testing.assert_close(linear(x), linear.base_layer(x) + x @ delta(linear).T)


def test_get_pattern_key() -> None:
    """peft.utils.other.get_pattern_key"""
    settings: dict[str, Any] = {"alpha_pattern": {"linear": 12, "near": 5}, "lora_alpha": 20}
    for rslora in (False, True):
        wrapper = adapted(**settings, use_rslora=rslora).linear
        rank = wrapper.lora_A[NAME].weight.shape[0]
        config = {**settings, "use_rslora": rslora}
        assert compat.scaling_from_config(config, "deep.linear", rank) == compat.lora_scaling(wrapper, NAME)
        assert compat.scaling_from_config(config, "other", 4) == (10 if rslora else 5)


def test_lora_variant(linear: Any) -> None:
    """lora_variant"""
    assert compat.lora_variant(linear, NAME) is None
    variant = compat.lora_variant(adapted(use_dora=True).linear, NAME)
    assert variant is not None and "Dora" in variant


def test_lora_magnitude_vector(linear: Any) -> None:
    """lora_magnitude_vector"""
    assert compat.dora_magnitude(linear, NAME) is None
    wrapper = adapted(use_dora=True).linear
    magnitude = compat.dora_magnitude(wrapper, NAME)
    assert magnitude is not None and magnitude.shape == (FEATURES,)
    weight = wrapper.base_layer.weight + delta(wrapper)
    weight = weight * (magnitude / weight.norm(dim=1))[:, None]
    x = torch.ones(1, FEATURES)
    torch.testing.assert_close(wrapper(x), x @ weight.T + wrapper.base_layer.bias)


def test_modules_to_save() -> None:
    """ModulesToSaveWrapper.modules_to_save"""
    wrapper = adapted(modules_to_save=["head"]).head
    saved = compat.saved_module(wrapper, NAME)
    x = torch.ones(1, FEATURES)
    assert saved is not None and torch.equal(saved(x), wrapper(x))
    assert not torch.equal(saved(x), wrapper.original_module(x))
    assert compat.saved_module(wrapper, "other") is None


def test_token_adapter() -> None:
    """TrainableTokensWrapper.token_adapter, token_indices, trainable_tokens_delta"""
    wrapper = adapted(trainable_token_indices={"embed": [7, 1]}).embed
    trained = compat.token_rows(wrapper, NAME)
    assert trained is not None
    tokens, rows = trained
    assert sorted(tokens) == [1, 7]
    assert torch.equal(wrapper(torch.tensor(tokens)), rows)
    assert compat.token_rows(wrapper, "other") is None


def test_peft_config() -> None:
    """peft_config on the base model"""
    model = adapted()
    assert hasattr(model, "peft_config")
    compat.forget_adapters(model)
    assert not hasattr(model, "peft_config")
    compat.forget_adapters(model)
