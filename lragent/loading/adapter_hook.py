"""Replaces an adapted module during capture: the module plus one placeholder LoRA chain of rank 1.

Every adapted module, linear or embedding, is captured as `base(x) + 0.5 * B A x` with placeholder weights of rank 1,
whichever LoRA variants its adapters are. `route_adapters` finds the chain by its parameters and replaces it by the
computation of the agents' adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HOOK_SCALING = 0.5


class Hook(nn.Module):
    """A linear module or embedding with the placeholder chain. Other attributes are read from the wrapped module.

    Args:
        base: the module, with weight `[out, in]`, its transpose (Conv1D), or `[tokens, out]` (embedding).
        inputs: input features; for an embedding, its number of tokens.
        outputs: output features.
        seed: seed of the placeholder weights; different for each hook.
    """

    def __init__(self, base: nn.Module, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.base_layer = base
        weight = base.weight
        assert isinstance(weight, Tensor)
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            numbers = 0.1 * torch.randn(shape, generator=generator)
            return nn.Parameter(numbers.to(weight.dtype), requires_grad=False)

        self.embeds = isinstance(base, nn.Embedding)
        self.lora_A = random(inputs, 1) if self.embeds else random(1, inputs)
        self.lora_B = random(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        low_rank = functional.embedding(x, self.lora_A) if self.embeds else functional.linear(x, self.lora_A)
        base: Tensor = self.base_layer(x)
        return base + functional.linear(low_rank, self.lora_B) * HOOK_SCALING

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
