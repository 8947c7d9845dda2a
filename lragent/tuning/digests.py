"""Digests: of adapters in every dtype that a run may have had, and of the base model."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeVar

import torch
from torch import Tensor

from lragent.loading.adapter_weights import LoraWeights, ReplacedRows, digest
from lragent.loading.model import LoadedModel

Weights = TypeVar("Weights", LoraWeights, ReplacedRows)

PROBED = 64  # numbers of a tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def digests_by_agent(loaded: LoadedModel) -> dict[str, frozenset[str]]:
    """Digests of each agent's adapter: that in the dtype of the model and, if that is float32, those in 16 bits.

    A digest is one of weights in a run's dtype, and weights that were rounded once don't tell what they were before.
    """
    found = {agent.name: {agent.digest} for agent in loaded.agents}
    for dtype in DTYPES if loaded.dtype == torch.float32 else ():
        for name in found:
            lora = {module: _cast(w[name], dtype) for module, w in loaded.lora.items() if name in w}
            rows = {module: _cast(w[name], dtype) for module, w in loaded.rows.items() if name in w}
            found[name].add(digest(lora, rows))
    return {name: frozenset(values) for name, values in found.items()}


def base_digest(loaded: LoadedModel) -> str:
    """A digest of the base model: names and shapes of its tensors, and some numbers of each."""
    found = hashlib.sha256()
    for name, tensor in loaded.model.state_dict().items():
        step = max(1, tensor.numel() // PROBED)
        probed = tensor.detach().flatten()[::step].to(torch.float32)
        found.update(f"{name} {tuple(tensor.shape)}".encode() + probed.cpu().numpy().tobytes())
    return found.hexdigest()


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    floats: dict[str, Any] = {
        name: value.to(dtype)
        for name, value in vars(weights).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(weights, **floats)
