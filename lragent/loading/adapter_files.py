"""Reads adapter weight files of PEFT and related tools, normalises their keys, and checks them against the base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lragent.errors import AdapterError, shortened
from lragent.loading.adapter_config import CONFIG
from lragent.loading.peft_layers import in_out

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
    name: str, path: Path, weights: Mapping[str, Tensor], saved_modules: Sequence[str], base: torch.nn.Module
) -> AdapterFile:
    """Normalises the keys of an adapter's weights to PEFT's names and separates trained biases.

    Accepts keys with or without the prefix `base_model.model.`, with the adapter's name (`lora_A.default.weight`), and
    with `_orig_mod.` or `_fsdp_wrapped_module.` anywhere. Drops copies of base weights (PEFT saves them with adapted
    embeddings) if they equal the base's.

    Args:
        path: the adapter's directory, for messages.
        saved_modules: `modules_to_save` of the adapter's config: suffixes of module FQNs.
        base: the base model without adapters.

    Raises:
        AdapterError: a key belongs to no module of the base or appears twice, a shape or dtype does not fit, or a copy
            of a base weight differs from the base.
    """
    modules = dict(base.named_modules())
    found = AdapterFile({}, {})
    for key, tensor in weights.items():
        plain = _WRAPPERS.sub("", key).lstrip(".")
        while plain.startswith(PEFT_PREFIX):
            plain = plain.removeprefix(PEFT_PREFIX)
        part = _PART.search(plain)
        owner = plain[: part.start()] if part else plain.replace(".base_layer.", ".").rpartition(".")[0]
        if part is not None:
            if owner not in modules:
                raise AdapterError(
                    f"adapter {name} ({path}) adapts module {owner}, which {type(base).__name__} does not have",
                    "The adapter was trained on another architecture; use its base model.",
                )
            _require_shape(name, path, key, tensor, part[1], owner, modules[owner])
            leaf = ".bias" if plain.endswith(".bias") else ".weight" if part[1] in ("lora_A", "lora_B") else ""
            peft_key = f"{PEFT_PREFIX}{owner}.{part[1]}{leaf}"
            if peft_key in found.tensors:
                raise AdapterError(
                    f"adapter {name} ({path}) has {owner}.{part[1]} twice, once as {key}", "Save the adapter again."
                )
            if not tensor.is_floating_point():
                raise AdapterError(f"adapter {name} ({path}): {key} holds {tensor.dtype}", "Save the adapter again.")
            found.tensors[peft_key] = tensor
        elif any(owner.endswith(end) for end in saved_modules) or owner not in modules:
            found.tensors[PEFT_PREFIX + plain] = tensor
        elif plain.endswith(".bias"):
            found.biases[owner] = tensor
        else:
            _require_base_copy(name, path, key, tensor, modules[owner])
    return found


def _require_shape(
    name: str, path: Path, key: str, tensor: Tensor, part: str, owner: str, module: torch.nn.Module
) -> None:
    sizes = in_out(module)
    if sizes is None or tensor.dim() != 2:
        return
    expected = sizes[0] if part.endswith("_A") else sizes[1]
    found = tensor.shape[1] if part.endswith("_A") else tensor.shape[0]
    if found != expected:
        raise AdapterError(
            f"adapter {name} ({path}): {key} has shape {list(tensor.shape)}, but {owner} of the base has"
            f" {expected} {'input' if part.endswith('_A') else 'output'} features",
            "The adapter was trained on another base model; use that one.",
        )


def _require_base_copy(name: str, path: Path, key: str, tensor: Tensor, module: torch.nn.Module) -> None:
    """Raises AdapterError unless a base weight in an adapter's file equals the base's, which agents share."""
    weight = getattr(module, key.rpartition(".")[2], None)
    if isinstance(weight, Tensor) and weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight.dtype)):
        return
    raise AdapterError(
        f"adapter {name} ({path}): {key} differs from the base weight, which agents share",
        "Use the base that it was trained on; list fully trained modules in modules_to_save.",
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
