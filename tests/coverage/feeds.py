"""Which outputs of which linear layers feed K or V, found by gradients: no names, no attention hook, no lragent.

Every linear layer's output is made a leaf. What a later token reads of a leaf's channel at an earlier token, without
another linear layer in between, it can only have read through attention: as K or V.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.oracle.kv_projection import KvProjection
from tests.oracle.precision import computing_in

IDS = [5, 40, 77, 12, 90, 33, 8, 61]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name; one with adapters counts as one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, (LoraLayer, nn.Linear, Conv1D)):
            found[name] = module
    return found


def kv_channels(model: Any) -> dict[str, Tensor]:
    """Layer name -> bool per output, for the layers of a float64 model that feed K or V."""
    leaves: dict[str, list[Tensor]] = {}
    read: list[Tensor] = []
    handles = []

    def cut(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            if not isinstance(output, Tensor):  # a router's choice
                return output
            read.append(inputs[0])
            leaf = output.detach().requires_grad_()
            leaves.setdefault(name, []).append(leaf)
            return leaf.clone()  # models may write into it

        return hook

    for name, module in linear_layers(model).items():
        handles.append(module.register_forward_hook(cut(name)))
    try:
        with torch.enable_grad(), computing_in(torch.float64):
            model(input_ids=torch.tensor([IDS]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(0)
    last = torch.zeros((), dtype=torch.float64)
    for x in read:
        if x.requires_grad and _by_token(x):
            weights = torch.rand(x.shape[-1], generator=generator, dtype=torch.float64) + 0.5
            last = last + (x[..., -1, :] * weights).sum()
    flat = [(name, leaf) for name, held in leaves.items() for leaf in held]
    grads = torch.autograd.grad(last, [leaf for _, leaf in flat], allow_unused=True)
    channels: dict[str, Tensor] = {}
    for (name, leaf), grad in zip(flat, grads, strict=True):
        if grad is None or not _by_token(leaf):
            continue
        fed = (grad.reshape(len(IDS), -1)[:-1] != 0).any(0)
        if bool(fed.any()):
            channels[name] = channels.get(name, torch.zeros_like(fed)) | fed
    return channels


def _by_token(x: Tensor) -> bool:
    """Whether a value is `[1, T, C]` or `[1, 1, T, C]`."""
    return x.dim() in (3, 4) and x.shape[-2] == len(IDS) and x.shape[:-2].numel() == 1


def take_apart(model: Any, channels: Mapping[str, Tensor]) -> list[KvProjection]:
    """Puts a `KvProjection` in place of every layer that feeds K or V (`model` is changed) and returns them."""
    root = model.get_base_model()
    projections = []
    for name, fed in channels.items():
        parent, _, leaf = name.rpartition(".")
        projection = KvProjection(root.get_submodule(name), fed)
        setattr(root.get_submodule(parent), leaf, projection)
        projections.append(projection)
    return projections
