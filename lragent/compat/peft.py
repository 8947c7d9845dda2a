"""Layer classes of PEFT and their undocumented attributes, as typed functions. Seen in peft 0.18 to 0.21.

`adapter` is the name of an adapter inside the PEFT model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["lora", "saved_module", "token_rows"]


def is_wrapper(module: nn.Module) -> bool:
    """True for a module that PEFT put in the place of an adapted one.

    Private API: `peft.tuners.tuners_utils.BaseTunerLayer`, `peft.utils.other.AuxiliaryTrainingWrapper`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def kind_of(wrapper: nn.Module) -> Kind | None:
    """Kind of a wrapper: LoRA on a linear layer or an embedding, a module in `modules_to_save`, or trained token rows.

    None for all other wrappers, subclasses of PEFT's LoRA layers included: they compute something else.

    Private API: `peft.tuners.lora.Linear` and `.Embedding`, `peft.utils.other.ModulesToSaveWrapper` and
    `.TrainableTokensWrapper`.
    """
    from peft.tuners.lora import Embedding, Linear
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if type(wrapper) in (Linear, Embedding):
        return "lora"
    if isinstance(wrapper, ModulesToSaveWrapper):
        return "saved_module"
    return "token_rows" if isinstance(wrapper, TrainableTokensWrapper) else None


def base_module(wrapper: Any, kind: Kind) -> nn.Module:
    """The module that a wrapper replaces.

    Private API: `base_layer` of LoRA layers, `original_module` of `ModulesToSaveWrapper`, `token_adapter.base_layer` of
    `TrainableTokensWrapper`.
    """
    if kind == "lora":
        base = wrapper.base_layer
    else:
        base = wrapper.original_module if kind == "saved_module" else wrapper.token_adapter.base_layer
    assert isinstance(base, nn.Module)
    return base


def is_merged(wrapper: Any, kind: Kind) -> bool:
    """True if an adapter is added to the base module's weight.

    Private API: `merged` of LoRA layers and of `TrainableTokensWrapper.token_adapter`.
    """
    if kind == "saved_module":
        return False
    return bool(wrapper.merged if kind == "lora" else wrapper.token_adapter.merged)


def lora_matrices(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """A `[r, in]`, B `[out, r]` and the bias `[out]` of B, if it has one; None if the layer lacks the adapter.

    Private API: `lora_A`, `lora_B`, `lora_embedding_A` and `lora_embedding_B` of LoRA layers.
    """
    if adapter in wrapper.lora_A:
        b = wrapper.lora_B[adapter]
        return wrapper.lora_A[adapter].weight, b.weight, b.bias
    if adapter in getattr(wrapper, "lora_embedding_A", {}):
        return wrapper.lora_embedding_A[adapter], wrapper.lora_embedding_B[adapter], None
    return None


def lora_scaling(wrapper: Any, adapter: str) -> float:
    """Factor of B A.

    Private API: `scaling` of LoRA layers.
    """
    return float(wrapper.scaling[adapter])


def scaling_from_config(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Factor of B A that an adapter's config gives a module, as PEFT computes it when it makes the layer.

    Private API: `peft.utils.other.get_pattern_key`.

    Args:
        config: content of `adapter_config.json`.
        module: FQN in the base model.
        rank: of the module's A.
    """
    from peft.utils.other import get_pattern_key

    by_pattern = config.get("alpha_pattern") or {}
    alpha = by_pattern.get(get_pattern_key(list(by_pattern), module), config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def lora_variant(wrapper: Any, adapter: str) -> str | None:
    """Class name of an adapter's variant; None for plain LoRA.

    Private API: `lora_variant` of LoRA layers.
    """
    variant = wrapper.lora_variant.get(adapter)
    return None if variant is None else type(variant).__name__


def dora_magnitude(wrapper: Any, adapter: str) -> Tensor | None:
    """Trained magnitudes `[out]` of a DoRA adapter; None for other variants.

    Private API: `lora_magnitude_vector` of LoRA layers.
    """
    vectors = wrapper.lora_magnitude_vector
    magnitude: Tensor | None = vectors[adapter].weight if adapter in vectors else None
    return magnitude


def saved_module(wrapper: Any, adapter: str) -> nn.Module | None:
    """The module that an adapter puts in the place of the original one; None if the adapter has none.

    Private API: `ModulesToSaveWrapper.modules_to_save`.
    """
    if adapter not in wrapper.modules_to_save:
        return None
    saved = wrapper.modules_to_save[adapter]
    assert isinstance(saved, nn.Module)
    return saved


def token_rows(wrapper: Any, adapter: str) -> tuple[list[int], Tensor] | None:
    """Token ids and their trained rows `[ids, features]`; None if the adapter has none.

    Private API: `TrainableTokensWrapper.token_adapter`, with `token_indices` and `trainable_tokens_delta`.
    """
    layer = wrapper.token_adapter
    if adapter not in layer.token_indices:
        return None
    return list(layer.token_indices[adapter]), layer.trainable_tokens_delta[adapter]


def forget_adapters(base: nn.Module) -> None:
    """Removes PEFT's note of the adapters from the base model inside a PEFT model.

    Private API: `peft_config`, which PEFT sets on the base model.
    """
    if hasattr(base, "peft_config"):
        del base.peft_config
