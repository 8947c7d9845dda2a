"""Reads adapter weight files of PEFT and related tools, normalises their keys, and checks them against the base."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lragent.compat.transformers import key_conversion
from lragent.errors import AdapterError, shortened
from lragent.loading.adapter_config import CONFIG
from lragent.loading.adapter_sizes import (
    require_base_copy,
    require_lora_shape,
    require_not_empty,
    require_saved_shape,
)

WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."

# Prefixes of modules that torch.compile and FSDP insert into keys.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)")
_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.|$)")


@dataclass(frozen=True)
class AdapterFile:
    """Weights of one adapter.

    Args:
        tensors: PEFT key -> tensor.
        biases: module FQN -> trained bias.
    """

    tensors: dict[str, Tensor]
    biases: dict[str, Tensor]


def read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """Reads `adapter_model.safetensors`, or `adapter_model.bin` of older versions (tensors only, no code is run).

    Raises:
        AdapterError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, old = path / WEIGHTS, path / OLD_WEIGHTS
    if not file.is_file() and not old.is_file():
        raise AdapterError(f"adapter {name}: {path} has no {WEIGHTS}", "Save the adapter as safetensors.")
    try:
        if file.is_file():
            return load_file(file)
        loaded = torch.load(old, map_location="cpu", weights_only=True)
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(
            f"adapter {name}: {file} is damaged ({error}); size {file.stat().st_size} bytes", "Copy the file again."
        ) from error
    except Exception as error:  # unpickling can raise any type
        raise AdapterError(
            f"adapter {name}: {old} can't be read as tensors only ({type(error).__name__})",
            "Save the adapter as safetensors.",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise AdapterError(f"adapter {name}: {old} is not a dictionary of tensors", "Save the adapter as safetensors.")
    return loaded


def in_peft_names(
    name: str, path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], base: Any
) -> AdapterFile:
    """Normalises the keys of an adapter's weights to PEFT's names and separates trained biases.

    Accepts keys with or without the prefix `base_model.model.`, with the adapter's name (`lora_A.default.weight`), with
    `_orig_mod.` or `_fsdp_wrapped_module.` anywhere, and with the module names of older versions of transformers. Drops
    copies of base weights (PEFT saves them with adapted embeddings) if they equal the base's.

    Args:
        path: the adapter's directory, for messages.
        config: the adapter's config.
        base: the base model without adapters, a transformers model.

    Raises:
        AdapterError: a key belongs to no module of the base or appears twice, a tensor is empty, a shape or dtype does
            not fit, or a copy of a base weight differs from the base.
    """
    modules = dict(base.named_modules())
    saved = _saved_modules(config, modules)
    converted = key_conversion(base)
    where = f"adapter {name} ({path})"
    found = AdapterFile({}, {})
    for key, tensor in weights.items():
        require_not_empty(where, key, tensor)
        plain = _renamed(_plain(key), modules, converted)
        owner, part = _split(plain)
        if part is not None:
            if owner not in modules:
                _refuse_module(where, owner, converted, base)
            require_lora_shape(where, key, tensor, part[1], owner, base)
            leaf = ".bias" if plain.endswith(".bias") else ".weight" if part[1] in ("lora_A", "lora_B") else ""
            peft_key = f"{PEFT_PREFIX}{owner}.{part[1]}{leaf}"
            if peft_key in found.tensors:
                raise AdapterError(f"{where} has {owner}.{part[1]} twice, once as {key}", "Save the adapter again.")
            if not tensor.is_floating_point():
                raise AdapterError(f"{where}: {key} holds {tensor.dtype}", "Save the adapter again.")
            found.tensors[peft_key] = tensor
        elif owner in saved:
            require_saved_shape(where, key, tensor, owner, base)
            found.tensors[PEFT_PREFIX + plain] = tensor
        elif owner not in modules:
            found.tensors[PEFT_PREFIX + plain] = tensor
        elif plain.endswith(".bias"):
            found.biases[owner] = tensor
        else:
            require_base_copy(where, key, tensor, owner, base)
    return found


def lora_places(keys: Iterable[str], base: Any) -> dict[str, tuple[str, str]]:
    """For the keys of a file that hold an A or a B: FQN of the module in `base`, and "A" or "B".

    Args:
        base: the base model, with or without hooks.
    """
    modules = dict(base.named_modules())
    converted = key_conversion(base)
    places = {key: lora_part(_renamed(_plain(key), modules, converted)) for key in keys}
    return {key: (module, side) for key, (module, side) in places.items() if side}


def lora_part(key: str) -> tuple[str, str]:
    """FQN of the module that a key belongs to, and "A" or "B"; "" for a key that names neither matrix."""
    plain = _plain(key)
    owner, part = _split(plain)
    matrix = part is not None and part[1].rpartition("_")[2] in ("A", "B") and not plain.endswith(".bias")
    return owner, part[1][-1] if part is not None and matrix else ""


def _renamed(plain: str, modules: Mapping[str, object], converted: Callable[[str], tuple[str, bool]]) -> str:
    """A key in the module names of this version of transformers."""
    new = converted(plain)[0]
    return new if _split(plain)[0] not in modules and _split(new)[0] in modules else plain


def _plain(key: str) -> str:
    """A key without prefixes and names of wrappers."""
    plain = _WRAPPERS.sub("", key).lstrip(".")
    while plain.startswith(PEFT_PREFIX):
        plain = plain.removeprefix(PEFT_PREFIX)
    return plain


def _split(plain: str) -> tuple[str, re.Match[str] | None]:
    """FQN of the module that a key without prefixes belongs to, and the part of a LoRA layer that it names, if any."""
    part = _PART.search(plain)
    return plain[: part.start()] if part else plain.replace(".base_layer.", ".").rpartition(".")[0], part


def _saved_modules(config: Mapping[str, Any], modules: Mapping[str, torch.nn.Module]) -> set[str]:
    """FQNs of the modules that an adapter saves whole: those that `modules_to_save` names by the ends of their FQNs.

    With `ensure_weight_tying`, also the modules that share a weight with one of them; PEFT takes those out of the list.
    """
    ends = tuple(config.get("modules_to_save") or ())
    saved = {fqn for fqn in modules if fqn.endswith(ends)} if ends else set()
    if config.get("ensure_weight_tying"):
        shared = {id(weight) for fqn in saved if (weight := getattr(modules[fqn], "weight", None)) is not None}
        saved |= {fqn for fqn, module in modules.items() if id(getattr(module, "weight", None)) in shared}
    return saved


def _refuse_module(where: str, owner: str, converted: Callable[[str], tuple[str, bool]], base: Any) -> NoReturn:
    """Raises AdapterError for a LoRA layer on a module that the base doesn't have, with the reason."""
    parameter, joined = converted(f"{owner}.weight")
    if joined:
        raise AdapterError(
            f"{where} adapts {owner}, whose weight this version of transformers joins with others into one parameter,"
            f" {parameter}; adapters on parts of a parameter are not supported",
            "Leave such modules out of target_modules (experts, mostly), or merge the adapter into a model of its own.",
        )
    raise AdapterError(
        f"{where} adapts module {owner}, which {type(base).__name__} does not have",
        "The adapter was trained on another architecture; use its base model.",
    )


@contextmanager
def peft_errors(name: str, path: Path) -> Iterator[None]:
    """Converts errors that PEFT raises while it injects an adapter into AdapterError."""
    try:
        yield
    except AdapterError:
        raise
    except KeyError as error:
        raise AdapterError(f"adapter {name}: {path} has no weights for {error.args[0]}", "Save it again.") from error
    except Exception as error:  # a broken setting can raise anything: re.error, ModuleNotFoundError
        raise AdapterError(
            f"adapter {name}: PEFT can't load {path}: {shortened(error)}",
            f"Check {CONFIG}, and that the adapter was trained on this base model.",
        ) from error
