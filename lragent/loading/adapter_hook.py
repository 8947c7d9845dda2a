"""Replaces an adapted module during capture: the module plus one marker op.

Every adapted module, linear or embedding, is captured as `adapter_marker(x, base(x), FQN)`, whichever LoRA variants its
adapters are. `route_adapters` replaces the marker by the computation of the agents' adapters.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op


@custom_op("lragent::adapter_marker", mutates_args=())
def adapter_marker(x: Tensor, y: Tensor, module: str) -> Tensor:
    """`y` plus a fixed delta of rank 1 that depends on every channel of `x`, so that comparing the captured graph with
    the model shows a marker with a wrong `x` or `y`.

    Args:
        x: input of the adapted module, `[..., in]`; of an embedding, token ids `[...]` (integers).
        y: output of the module without adapter, `[..., out]`, in any float dtype.
        module: FQN of the module; it seeds the delta.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))

    def random(size: int) -> Tensor:
        return (0.1 * torch.randn(size, generator=generator)).to(y)

    low_rank = x.to(y.dtype) @ random(x.shape[-1]) if x.is_floating_point() else 0.1 * x.double().cos().to(y.dtype)
    return y + low_rank[..., None] * random(y.shape[-1])


@adapter_marker.register_fake
def _(x: Tensor, y: Tensor, module: str) -> Tensor:
    return torch.empty_like(y)


class Hook(nn.Module):
    """A linear module or embedding with the marker. Other attributes are read from the wrapped module.

    Args:
        base: the module.
        fqn: its fully qualified name.
    """

    def __init__(self, base: nn.Module, fqn: str) -> None:
        super().__init__()
        self.base_layer = base
        self.fqn = fqn

    def forward(self, x: Tensor) -> Tensor:
        marked: Tensor = adapter_marker(x, self.base_layer(x), self.fqn)
        return marked

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
