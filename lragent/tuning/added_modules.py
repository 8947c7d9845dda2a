"""New adapters on modules that the given ones leave out, such as o and MLP; their B is zero.

Adapters on modules that give no K or V add no cache. The adapters are written as directories of their own, with the new
modules in config and weights, so that everything after this sees ordinary adapters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lragent.errors import AdapterError
from lragent.loading.adapter_config import read_config
from lragent.loading.adapter_files import PEFT_PREFIX, read_weights
from lragent.loading.adapter_hook import Hook
from lragent.loading.agent_slots import groups_of
from lragent.loading.model import LoadedModel
from lragent.loading.peft_layers import in_out
from lragent.tuning.adapter_directory import write_adapter

ALL_LINEAR = "all-linear"


def modules_to_add(loaded: LoadedModel, names: Sequence[str]) -> tuple[str, ...]:
    """FQNs of the linear modules whose names end as given; the LM head only if it is named.

    Raises:
        AdapterError: a name fits no linear module.
    """
    head = loaded.model.get_output_embeddings()
    linear = {fqn: module for fqn, module in _plain_modules(loaded.model) if not isinstance(module, nn.Embedding)}
    inner = [fqn for fqn, module in linear.items() if module is not getattr(head, "base_layer", head)]
    found: dict[str, None] = {}
    for name in names:
        fits = inner if name == ALL_LINEAR else [fqn for fqn in linear if fqn == name or fqn.endswith(f".{name}")]
        if not fits:
            known = ", ".join(sorted({fqn.rpartition(".")[2] for fqn in inner}))
            raise AdapterError(
                f"--add-modules {name}: no linear module has a name that ends so", f"This model has {known}."
            )
        found |= dict.fromkeys(fits)
    return tuple(found)


def with_added_modules(
    loaded: LoadedModel, modules: Sequence[str], rank: int | None, seed: int, out: Path
) -> dict[str, Path]:
    """Writes each adapter with new modules to `out`; returns the directories by agent.

    A module that an agent adapts already stays as it is. If the adapters share every A, so do the new ones.

    Args:
        rank: of the new adapters; None: that of the adapter's config. The scaling is that of the config in any case.
    """
    sizes = {fqn: in_out(module) for fqn, module in _plain_modules(loaded.model)}
    shared = bool(loaded.lora) and all(len(set(group)) == 1 for group in groups_of(loaded).values())
    folders = {}
    for agent, folder in loaded.adapter_folders.items():
        own = [fqn for fqn, by_agent in loaded.lora.items() if agent in by_agent]
        new = [fqn for fqn in modules if agent not in loaded.lora.get(fqn, {})]
        config = read_config(agent, folder)
        added = rank or int(config["r"])
        tensors = dict(read_weights(agent, folder))
        dtype = next(iter(tensors.values())).dtype
        for fqn in new:
            size = sizes[fqn]
            assert size is not None
            name = f"{seed} {fqn}" if shared else f"{seed} {fqn} {agent}"
            tensors[f"{PEFT_PREFIX}{fqn}.lora_A.weight"] = _random_a(added, size[0], name).to(dtype)
            tensors[f"{PEFT_PREFIX}{fqn}.lora_B.weight"] = torch.zeros(size[1], added, dtype=dtype)
        folders[agent] = out / agent
        extended = _extended(config, own, new, added)
        write_adapter(folder, tensors, folders[agent], {"format": "pt"}, extended)
    return folders


def _plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """FQNs and modules of linear layers and embeddings, without hooks."""
    found = []
    for fqn, module in model.named_modules():
        plain = module.base_layer if isinstance(module, Hook) else module
        if not fqn.endswith(".base_layer") and in_out(plain) is not None:
            found.append((fqn, plain))
    return found


def _random_a(rank: int, features: int, name: str) -> Tensor:
    """A as PEFT initialises it, drawn from the name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(features)
    return torch.empty(rank, features).uniform_(-bound, bound, generator=generator)


def _extended(config: Mapping[str, Any], own: Sequence[str], new: Sequence[str], rank: int) -> dict[str, Any]:
    """The config with explicit target modules; ranks and scalings of the old ones stay."""
    patterns = {name: dict(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    if rank != config["r"]:
        root = math.sqrt if config.get("use_rslora") else float
        alpha = config.get("lora_alpha", 8) * root(rank) / root(config["r"])
        patterns["rank_pattern"] = {**dict.fromkeys(new, rank), **patterns["rank_pattern"]}
        patterns["alpha_pattern"] = {**dict.fromkeys(new, alpha), **patterns["alpha_pattern"]}
    free = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {**config, **free, **patterns, "target_modules": [*own, *new]}
