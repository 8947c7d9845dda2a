"""Reads a LoRA adapter for a program in memory, where no model is at hand: from memory or from a PEFT directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lragent.compat.peft import scaling_from_config
from lragent.errors import AdapterError
from lragent.files.user_path import user_path
from lragent.loading.adapter_config import read_config
from lragent.loading.adapter_files import lora_part, read_weights
from lragent.loading.adapter_weights import LoraWeights, require_finite
from lragent.program.adapter_map import RoutedConstants
from lragent.program.agent import Agent
from lragent.program.live_adapters import AdapterWeights, GivenAdapter

CONVERT = "Put it into an artifact with `lragent convert` (with --update, if only weights have changed)."


def read_lora(
    present: Agent, given: GivenAdapter, modules: Mapping[str, RoutedConstants], dtype: torch.dtype
) -> dict[str, LoraWeights]:
    """Module FQN -> weights of an adapter, on the CPU.

    Args:
        present: the agent with its present adapter.
        modules: the modules that the program adapts.
        dtype: of the program's weights.

    Raises:
        AdapterError: see `lragent.program.live_adapters.AdapterSlots.read`.
    """
    where = f"adapter {present.name}"
    if isinstance(given, (str, Path)):
        given = read_directory(present.name, user_path(given))
    elif not isinstance(given, AdapterWeights):
        given = AdapterWeights(given, _present_scaling(present, modules))
    if not given.matrices:
        raise AdapterError(f"{where} adapts no module", "Give its matrices.")
    found: dict[str, LoraWeights] = {}
    for module, (a, b) in given.matrices.items():
        if module not in modules:
            raise AdapterError(f"{where} adapts {module}, which no agent of the program adapts", CONVERT)
        scaling = given.scaling if isinstance(given.scaling, (int, float)) else given.scaling.get(module)
        if scaling is None:
            raise AdapterError(f"{where} has no scaling for {module}", "Give one for every module.")
        on_cpu = [matrix.detach().to("cpu", dtype, copy=True) for matrix in (a, b)]
        found[module] = LoraWeights(on_cpu[0], on_cpu[1], float(scaling) * modules[module].scale)
        require_finite(f"{where}: module {module}", found[module])
    return found


def read_directory(name: str, path: Path) -> AdapterWeights:
    """Reads the directory of a plain PEFT LoRA adapter, without its base model.

    Raises:
        AdapterError: the directory can't be read, or holds more than A and B.
    """
    config = read_config(name, path)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(name, path).items():
        module, side = lora_part(key)
        if not side:
            raise AdapterError(f"adapter {name} ({path}) has {key}, which is not A or B of a LoRA layer", CONVERT)
        sides.setdefault(module, {})[side] = tensor
    for module, matrices in sides.items():
        if len(matrices) < 2:
            raise AdapterError(f"adapter {name} ({path}) has only one matrix of {module}", "Save the adapter again.")
    scaling = {module: scaling_from_config(config, module, ab["A"].shape[0]) for module, ab in sides.items()}
    return AdapterWeights({module: (ab["A"], ab["B"]) for module, ab in sides.items()}, scaling)


def _present_scaling(present: Agent, modules: Mapping[str, RoutedConstants]) -> float:
    """The scaling of all modules of an agent's present adapter."""
    if len(present.scalings) != 1 or any(modules[module].scale != 1 for module in present.targets if module in modules):
        raise AdapterError(
            f"adapter {present.name} has several scalings by module, or a scaled embedding",
            "Give AdapterWeights(matrices, scaling).",
        )
    return present.scalings[0]
