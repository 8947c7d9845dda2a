"""Reference of `lragent.kernels.ops.routed_linears`: plain PyTorch, on any device.

Legend: T = tokens, K = input features, N = output features of all projections together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def routed_linears(
    x: Tensor,
    agent_ids_T: Tensor,
    tensors: list[Tensor],
    bias_of: list[int],
    up_of: list[int],
    down_of: list[int],
    routes: list[int],
) -> Tensor:
    """Projections `[..., N]` of `x` `[..., K]`; see `lragent.kernels.ops.routed_linears`."""
    linear = torch.nn.functional.linear
    outputs = [linear(x, tensors[i], tensors[bias] if bias >= 0 else None) for i, bias in enumerate(bias_of)]
    size = (routes[0] + 1) * 3
    tables = iter(range(1, len(routes), size))
    for i, place in enumerate(up_of):
        if place >= 0:
            first = next(tables)
            table = routes[first : first + size]
            down = down_of[i]
            low = outputs[down] if down < len(outputs) else linear(x, tensors[down])
            own = _own_columns(low, agent_ids_T, table, tensors[place].shape[0])
            outputs[i] = outputs[i] + own @ tensors[place]
    return torch.cat(outputs, -1)


def _own_columns(low: Tensor, agent_ids_T: Tensor, table: list[int], columns: int) -> Tensor:
    """`[..., columns]`: each token's agent's part of the down-projection at its place, zeros elsewhere."""
    own = low.new_zeros(*low.shape[:-1], columns)
    for agent in range(len(table) // 3):
        source, target, rank = table[3 * agent : 3 * agent + 3]
        part = low[..., source : source + rank] * (agent_ids_T == agent)[:, None].to(low.dtype)
        own[..., target : target + rank] += part
    return own
