"""Reads `adapter_config.json` and refuses PEFT settings that are not supported."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lragent.errors import AdapterError

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"

# Refused settings of PEFT's LoraConfig, which change what an adapter computes: name -> (description, hint).
_WITHOUT = "Train the adapter without it."
_MERGE = "Merge the adapter into a model of its own, or train it on linear layers."
UNSUPPORTED = {
    "alora_invocation_tokens": ("activated LoRA (aLoRA)", "Train it as plain LoRA, without invocation tokens."),
    "target_parameters": ("adapters on bare parameters, such as fused experts (target_parameters)", _MERGE),
    "layer_replication": ("layer replication", _WITHOUT),
    "use_qalora": ("QA-LoRA", _WITHOUT),
    "use_bdlora": ("BD-LoRA", _WITHOUT),
    "arrow_config": ("Arrow routing", "Use the experts as adapters of their own."),
    "kasa_config": ("KaSA, which changes the base weights", _WITHOUT),
    "velora_config": ("VeLoRA", _WITHOUT),
    "monteclora_config": ("MonteCLoRA", _WITHOUT),
}
# Initialisations of A and B that leave the base weights unchanged.
_INITIAL_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(name: str, path: Path) -> dict[str, Any]:
    """Reads and checks `adapter_config.json`.

    Raises:
        AdapterError: the folder or file is missing, is not JSON, or has an unsupported kind of adapter.
    """
    if not path.is_dir():
        raise AdapterError(f"adapter {name}: no directory at {path}", f"Give a folder with {CONFIG}.")
    file = path / CONFIG
    if not file.is_file():
        raise AdapterError(f"adapter {name}: {path} has no {CONFIG}", "Save the adapter with save_pretrained.")
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise AdapterError(f"adapter {name}: {file} is not JSON: {error}", "Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"adapter {name}: {file} is not a JSON object", "Save the adapter again.")
    require_supported(name, config, str(file))
    return config


def require_supported(name: str, config: Mapping[str, Any], where: str) -> None:
    """Checks that a config describes a supported LoRA adapter.

    Args:
        where: source of the config, for messages.

    Raises:
        AdapterError: the adapter is not LoRA, or has an unsupported setting; names adapter, setting and value.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise AdapterError(
            f"adapter {name}: peft_type is {kind!r} in {where}",
            "Only LoRA adapters have a low-rank stream to share; train the role as LoRA.",
        )
    for setting, (what, remedy) in UNSUPPORTED.items():
        if config.get(setting):
            raise AdapterError(
                f"adapter {name}: {setting}={config[setting]!r} in {where}: {what} is not supported", remedy
            )
    initial = config.get("init_lora_weights", True)
    if initial not in _INITIAL_WEIGHTS:
        raise AdapterError(
            f"adapter {name}: init_lora_weights={initial!r} in {where} changes the base weights, which agents share",
            "Save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion).",
        )


def lora_config(name: str, config: Mapping[str, Any]) -> Any:
    """Builds PEFT's `LoraConfig` for loading an adapter.

    Settings unknown to the installed PEFT are dropped with a warning. Initialisation is PEFT's default. `bias` is
    "none": PEFT would write trained biases into the shared base; `adapter_files` reads them instead.
    """
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = sorted(key for key, value in config.items() if key not in known and value)
    if unknown:
        log.warning("adapter %s: settings unknown to the installed PEFT are ignored: %s", name, ", ".join(unknown))
    kept = {key: value for key, value in config.items() if key in known}
    kept |= {"inference_mode": True, "bias": "none", "init_lora_weights": True}
    return LoraConfig(**kept)


def note_on_bases(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A note if the adapters name different base models; "" if they don't.

    Names decide nothing. Copies of one model have many: a hub id, a folder, a copy in 4 bits of another owner. Modules
    and shapes are compared with the model instead.
    """
    bases = {name: _repository(str(config.get("base_model_name_or_path") or "")) for name, config in configs.items()}
    named = {name: base for name, base in bases.items() if base}
    if len({base.lower() for base in named.values()}) < 2:
        return ""
    found = ", ".join(f"{name}: {base}" for name, base in named.items())
    return f"the adapters name different base models ({found}); their modules and shapes fit this one"


def _repository(name: str) -> str:
    """The hub id in a base model's name, also of a folder in the hub's cache; "" for other paths."""
    cached = re.search(r"(?:^|[/\\])models--([^/\\]+)", name)
    if cached:
        return cached[1].replace("--", "/", 1)
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else ""
