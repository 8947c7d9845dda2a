"""Reads adapters from the layers of a PEFT model and replaces the layers by hooks (`adapter_hook.py`).

PEFT's wrappers are removed and their base modules put back. The adapter weights of a wrapper become `LoraWeights` or
`ReplacedRows`. A wrapper that computes anything else is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lragent.errors import AdapterError
from lragent.loading.adapter_hook import Hook
from lragent.loading.adapter_weights import LoraWeights, ReplacedRows, dora_gain


@dataclass
class Adapted:
    """Adapters of a model.

    Args:
        lora: module FQN -> agent name -> weights.
        rows: module FQN -> agent name -> replaced rows.
    """

    lora: dict[str, dict[str, LoraWeights]] = field(default_factory=dict)
    rows: dict[str, dict[str, ReplacedRows]] = field(default_factory=dict)


def take_apart(root: nn.Module, internal: Mapping[str, str], found: Adapted) -> None:
    """Reads the adapters of a PEFT model into `found` and replaces PEFT's wrappers by their base modules, in place.

    Args:
        root: the base model inside the PEFT model.
        internal: agent name -> PEFT adapter name.
        found: is extended.

    Raises:
        AdapterError: a wrapper is not supported; names the module and the kind of wrapper.
    """
    for fqn, wrapper in _wrappers(root):
        parent, _, leaf = fqn.rpartition(".")
        setattr(root.get_submodule(parent), leaf, _read(found, fqn, wrapper, internal))
    if hasattr(root, "peft_config"):
        del root.peft_config


def add_biases(root: nn.Module, agent: str, biases: Mapping[str, Tensor], found: Adapted) -> None:
    """Adds an agent's trained biases to its `LoraWeights`, as the difference from the base's bias.

    Args:
        biases: module FQN -> trained bias `[out]`, which replaces the module's bias.
        found: is changed.

    Raises:
        AdapterError: the agent does not adapt the module otherwise, or the module has no bias.
    """
    for fqn, bias in biases.items():
        base_bias = getattr(root.get_submodule(fqn), "bias", None)
        if base_bias is not None and torch.equal(bias.to(base_bias.dtype), base_bias):
            continue
        weights = found.lora.get(fqn, {}).get(agent)
        if weights is None or base_bias is None:
            raise AdapterError(
                f"adapter {agent} trained the bias of {fqn}, which it does not adapt otherwise",
                'Biases of adapted linear layers can differ by agent: train with bias="lora_only".',
            )
        trained = bias.to(base_bias.dtype) - base_bias.detach()
        constant = trained if weights.constant is None else weights.constant + trained
        found.lora[fqn][agent] = dataclasses.replace(weights, constant=constant)


def put_hooks(root: nn.Module, found: Adapted) -> None:
    """Replaces every adapted module by its hook, in place."""
    for fqn in dict.fromkeys((*found.lora, *found.rows)):
        parent, _, leaf = fqn.rpartition(".")
        setattr(root.get_submodule(parent), leaf, Hook(root.get_submodule(fqn), fqn))


def in_out(module: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a linear module (Linear or Conv1D) or an embedding; None for other modules."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "nf"):  # transformers' Conv1D
        return weight.shape[0], weight.shape[1]
    return None


def weight_of(module: nn.Module) -> Tensor:
    """Weight `[out, in]` of a linear module or an embedding (whose input is one-hot)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def _wrappers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields FQN and module of PEFT's outermost wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    seen: list[str] = []
    for fqn, module in list(root.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            if not any(fqn.startswith(f"{outer}.") for outer in seen):
                yield fqn, module
            seen.append(fqn)


def _read(found: Adapted, fqn: str, wrapper: Any, internal: Mapping[str, str]) -> nn.Module:
    """Reads one wrapper and returns its base module."""
    from peft.tuners.lora import Embedding, Linear
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    reader: Callable[[str, Any, str], LoraWeights | ReplacedRows | None]
    if type(wrapper) in (Linear, Embedding):
        base, reader = wrapper.base_layer, _lora
        if wrapper.merged:
            raise AdapterError(f"module {fqn} has a merged adapter", "Call unmerge_adapter() on the model first.")
    elif isinstance(wrapper, ModulesToSaveWrapper):
        base, reader = wrapper.original_module, _saved_module
    elif isinstance(wrapper, TrainableTokensWrapper):
        base, reader = wrapper.token_adapter.base_layer, _token_rows
        if wrapper.token_adapter.merged:
            raise AdapterError(f"module {fqn} has merged token rows", "Call unmerge_adapter() on the model first.")
    else:
        names = ", ".join(internal)
        raise AdapterError(
            f"adapter {names}: module {fqn} is adapted as {type(wrapper).__name__}, which is not supported",
            "Adapters on linear layers and embeddings are supported: leave this module out of target_modules.",
        )
    for agent, key in internal.items():
        read = reader(f"adapter {agent}: module {fqn}", wrapper, key)
        if isinstance(read, LoraWeights):
            found.lora.setdefault(fqn, {})[agent] = read
        elif read is not None:
            found.rows.setdefault(fqn, {})[agent] = read
    assert isinstance(base, nn.Module)
    return base


def _lora(where: str, wrapper: Any, key: str) -> LoraWeights | None:
    base = wrapper.base_layer
    dtype = weight_of(base).dtype
    bias = None
    if key in wrapper.lora_A:
        a, b = wrapper.lora_A[key].weight, wrapper.lora_B[key].weight
        bias = wrapper.lora_B[key].bias
    elif key in getattr(wrapper, "lora_embedding_A", {}):
        a, b = wrapper.lora_embedding_A[key], wrapper.lora_embedding_B[key]
    else:
        return None
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    scaling = float(wrapper.scaling[key])
    constant = None if bias is None else bias.detach().to(dtype) * scaling
    gain = None
    variant = wrapper.lora_variant.get(key)
    if variant is not None:
        if key not in wrapper.lora_magnitude_vector:
            raise AdapterError(
                f"{where} is adapted as {type(variant).__name__}, which is not supported",
                "Plain LoRA, rsLoRA and DoRA are supported.",
            )
        magnitude = wrapper.lora_magnitude_vector[key].weight.detach()
        gain = dora_gain(weight_of(base), a, b, scaling, magnitude)
        base_bias = getattr(base, "bias", None)
        constant = None if base_bias is None else (1 - gain) * base_bias.detach()
    return LoraWeights(a, b, scaling * _embed_scale(base), gain, constant)


def _saved_module(where: str, wrapper: Any, key: str) -> ReplacedRows | None:
    if key not in wrapper.modules_to_save:
        return None
    base, saved = wrapper.original_module, wrapper.modules_to_save[key]
    if not isinstance(base, (nn.Linear, nn.Embedding)):
        raise AdapterError(
            f"{where} ({type(base).__name__}) is in modules_to_save",
            "Only linear layers and embeddings can be in modules_to_save; remove this module from it.",
        )
    dtype = base.weight.dtype
    weight = saved.weight.detach().to(dtype) * _embed_scale(base)
    bias = getattr(saved, "bias", None)
    return ReplacedRows(torch.arange(weight.shape[0]), weight, None if bias is None else bias.detach().to(dtype))


def _token_rows(where: str, wrapper: Any, key: str) -> ReplacedRows | None:
    layer = wrapper.token_adapter
    if key not in layer.token_indices:
        return None
    base = layer.base_layer
    weight = layer.trainable_tokens_delta[key].detach().to(base.weight.dtype) * _embed_scale(base)
    return ReplacedRows(torch.tensor(layer.token_indices[key]), weight)


def _embed_scale(base: nn.Module) -> float:
    """Factor that an embedding applies to its rows; 1 for other modules."""
    scale = getattr(base, "embed_scale", 1.0)
    return float(scale) if isinstance(base, nn.Embedding) else 1.0
