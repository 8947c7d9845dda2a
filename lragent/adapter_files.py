"""Adapter directories as PEFT writes them: reading, checking, fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lragent.errors import AdapterError

if TYPE_CHECKING:
    from lragent.loading import LoraWeights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# Settings of PEFT's LoraConfig that change what an adapter computes and that are not supported yet: name -> what it is.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "lora_bias": "a bias in lora_B",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "target_parameters": "adapters on bare parameters (target_parameters)",
    "layer_replication": "layer replication",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}


def read_config(name: str, path: Path) -> dict[str, Any]:
    """Reads and checks `adapter_config.json`.

    Raises:
        AdapterError: no such folder or file, not JSON, or a kind of adapter that is not supported.
    """
    if not path.is_dir():
        raise AdapterError(f"adapter {name}: no directory at {path}", f"Give a folder with {CONFIG} and {WEIGHTS}.")
    file = path / CONFIG
    if not file.is_file():
        raise AdapterError(f"adapter {name}: {path} has no {CONFIG}", "Save the adapter with save_pretrained.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"adapter {name}: {file} is not JSON: {error}", "Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"adapter {name}: {file} holds no JSON object", "Save the adapter again.")
    require_supported(name, config, str(file))
    return config


def require_supported(name: str, config: Mapping[str, Any], where: str) -> None:
    """Refuses what is not plain LoRA.

    Raises:
        AdapterError: names adapter, setting and value.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise AdapterError(f"adapter {name}: peft_type is {kind!r} in {where}", "Only LoRA adapters can be shared.")
    for setting, what in UNSUPPORTED.items():
        if config.get(setting):
            raise AdapterError(
                f"adapter {name}: {setting}={config[setting]!r} in {where}: {what} is not supported",
                "Train or merge the adapter without it.",
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"adapter {name}: bias={config['bias']!r} in {where}: trained biases are not supported",
            'Train the adapter with bias="none".',
        )


def require_same_base(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Adapters of one set must name the same base model (compared by the last part of its name)."""
    bases = {
        name: str(config["base_model_name_or_path"]).rstrip("/").rsplit("/", 1)[-1]
        for name, config in configs.items()
        if config.get("base_model_name_or_path")
    }
    if len(set(bases.values())) > 1:
        found = ", ".join(f"{name}: {base}" for name, base in bases.items())
        raise AdapterError(
            f"adapters were trained on different base models ({found})",
            f"Use adapters of one base, or correct base_model_name_or_path in {CONFIG}.",
        )


def read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """Reads `adapter_model.safetensors`.

    Raises:
        AdapterError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS
    if not file.is_file():
        raise AdapterError(f"adapter {name}: {path} has no {WEIGHTS}", "Save the adapter as safetensors.")
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(
            f"adapter {name}: {file} is damaged ({error}); size {file.stat().st_size} bytes", "Copy the file again."
        ) from error


def linear_sizes(base: torch.nn.Module) -> dict[str, tuple[int, int] | None]:
    """Every module of the base: input and output width where it is linear, else None."""
    return {fqn: _in_out(module) for fqn, module in base.named_modules()}


def require_fits(
    name: str,
    path: Path,
    weights: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, int] | None],
    architecture: str,
) -> None:
    """Every LoRA weight must belong to a module of the base (`sizes`, see `linear_sizes`), with its shape.

    Raises:
        AdapterError: names adapter, module, shapes.
    """
    for key, tensor in weights.items():
        if ".lora_A." not in key and ".lora_B." not in key:
            continue
        part = "lora_A" if ".lora_A." in key else "lora_B"
        fqn = key.removeprefix(PEFT_PREFIX).split(f".{part}.")[0]
        if fqn not in sizes:
            raise AdapterError(
                f"adapter {name} ({path}) adapts module {fqn}, which {architecture} does not have",
                "The adapter was trained on another architecture; use the base model that it was trained on.",
            )
        in_out = sizes[fqn]
        if in_out is None:
            continue
        expected = in_out[0] if part == "lora_A" else in_out[1]
        found = tensor.shape[1] if part == "lora_A" else tensor.shape[0]
        if found != expected:
            raise AdapterError(
                f"adapter {name} ({path}): {key} has shape {list(tensor.shape)}, but {fqn} of the base needs"
                f" {expected} there",
                "The adapter was trained on another base model; use that one.",
            )


def _in_out(module: torch.nn.Module) -> tuple[int, int] | None:
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "nf"):  # transformers' Conv1D
        return weight.shape[0], weight.shape[1]
    return None


@contextmanager
def peft_errors(name: str, path: Path) -> Iterator[None]:
    """Turns what PEFT raises while it injects an adapter into an AdapterError."""
    try:
        yield
    except AdapterError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        text = str(error).strip().splitlines()
        raise AdapterError(
            f"adapter {name}: PEFT can't load {path}: {text[0] if text else type(error).__name__}",
            "Check that the adapter was trained on this base model.",
        ) from error


def digest(weights: Mapping[str, LoraWeights]) -> str:
    """sha256 over an adapter's weights and scalings, independent of its name."""
    sha = hashlib.sha256()
    for module in sorted(weights):
        pair = weights[module]
        sha.update(f"{module} {pair.scaling!r}".encode())
        for tensor in (pair.a, pair.b):
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
