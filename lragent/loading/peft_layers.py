"""Reads adapters from the layers of a PEFT model and replaces the layers by hooks (`adapter_hook.py`).

PEFT's wrappers are removed and their base modules put back. The adapter weights of a wrapper become `LoraWeights` or
`ReplacedRows`. A wrapper that computes anything else is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lragent.compat import peft as layers
from lragent.compat.transformers import embedding_scale, is_conv1d
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
    layers.forget_adapters(root)


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
    if isinstance(weight, Tensor) and is_conv1d(module):
        return weight.shape[0], weight.shape[1]
    return None


def weight_of(module: nn.Module) -> Tensor:
    """Weight `[out, in]` of a linear module or an embedding (whose input is one-hot)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def _wrappers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields FQN and module of PEFT's outermost wrappers."""
    seen: list[str] = []
    for fqn, module in list(root.named_modules()):
        if layers.is_wrapper(module):
            if not any(fqn.startswith(f"{outer}.") for outer in seen):
                yield fqn, module
            seen.append(fqn)


def _read(found: Adapted, fqn: str, wrapper: nn.Module, internal: Mapping[str, str]) -> nn.Module:
    """Reads one wrapper and returns its base module."""
    kind = layers.kind_of(wrapper)
    if kind is None:
        names = ", ".join(internal)
        raise AdapterError(
            f"adapter {names}: module {fqn} is adapted as {type(wrapper).__name__}, which is not supported",
            "Adapters on linear layers and embeddings are supported: leave this module out of target_modules.",
        )
    if layers.is_merged(wrapper, kind):
        merged = "merged token rows" if kind == "token_rows" else "a merged adapter"
        raise AdapterError(f"module {fqn} has {merged}", "Call unmerge_adapter() on the model first.")
    base = layers.base_module(wrapper, kind)
    for agent, key in internal.items():
        where = f"adapter {agent}: module {fqn}"
        read = _READERS[kind](where, wrapper, base, key)
        if isinstance(read, LoraWeights):
            found.lora.setdefault(fqn, {})[agent] = read
        elif read is not None:
            found.rows.setdefault(fqn, {})[agent] = read
    return base


def _lora(where: str, wrapper: nn.Module, base: nn.Module, key: str) -> LoraWeights | None:
    matrices = layers.lora_matrices(wrapper, key)
    if matrices is None:
        return None
    dtype = weight_of(base).dtype
    a, b = (matrix.detach().to(dtype) for matrix in matrices[:2])
    bias = matrices[2]
    scaling = layers.lora_scaling(wrapper, key)
    constant = None if bias is None else bias.detach().to(dtype) * scaling
    gain = None
    variant = layers.lora_variant(wrapper, key)
    if variant is not None:
        magnitude = layers.dora_magnitude(wrapper, key)
        if magnitude is None:
            raise AdapterError(
                f"{where} is adapted as {variant}, which is not supported",
                "Plain LoRA, rsLoRA and DoRA are supported.",
            )
        gain = dora_gain(weight_of(base), a, b, scaling, magnitude.detach())
        base_bias = getattr(base, "bias", None)
        constant = None if base_bias is None else (1 - gain) * base_bias.detach()
    return LoraWeights(a, b, scaling * embedding_scale(base), gain, constant)


def _saved_module(where: str, wrapper: nn.Module, base: nn.Module, key: str) -> ReplacedRows | None:
    saved = layers.saved_module(wrapper, key)
    if saved is None:
        return None
    if not isinstance(base, (nn.Linear, nn.Embedding)):
        raise AdapterError(
            f"{where} ({type(base).__name__}) is in modules_to_save",
            "Only linear layers and embeddings can be in modules_to_save; remove this module from it.",
        )
    dtype = base.weight.dtype
    assert isinstance(saved.weight, Tensor)
    weight = saved.weight.detach().to(dtype) * embedding_scale(base)
    bias = getattr(saved, "bias", None)
    return ReplacedRows(torch.arange(weight.shape[0]), weight, None if bias is None else bias.detach().to(dtype))


def _token_rows(where: str, wrapper: nn.Module, base: nn.Module, key: str) -> ReplacedRows | None:
    trained = layers.token_rows(wrapper, key)
    if trained is None:
        return None
    tokens, rows = trained
    return ReplacedRows(torch.tensor(tokens), rows.detach().to(weight_of(base).dtype) * embedding_scale(base))


_READERS: Mapping[layers.Kind, Callable[[str, nn.Module, nn.Module, str], LoraWeights | ReplacedRows | None]] = {
    "lora": _lora,
    "saved_module": _saved_module,
    "token_rows": _token_rows,
}
