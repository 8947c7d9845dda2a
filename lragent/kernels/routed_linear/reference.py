"""Reference of `lragent.kernels.ops.routed_linears`: plain PyTorch, on any device.

Legend: T = tokens, K = input features, N = sum of the output features of all projections.
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
    route_starts = iter(range(1, len(routes), size))
    for i, up in enumerate(up_of):
        if up >= 0:
            first = next(route_starts)
            agent_routes = routes[first : first + size]
            down = down_of[i]
            lr = outputs[down] if down < len(outputs) else linear(x, tensors[down])
            routed = _routed_lr(lr, agent_ids_T, agent_routes, tensors[up].shape[0])
            outputs[i] = outputs[i] + routed @ tensors[up]
    return torch.cat(outputs, -1)


def _routed_lr(lr: Tensor, agent_ids_T: Tensor, agent_routes: list[int], ranks: int) -> Tensor:
    """`[..., ranks]`: per token, the LR part of its agent at the agent's rows of lora_b, and zeros elsewhere."""
    routed = lr.new_zeros(*lr.shape[:-1], ranks)
    for agent in range(len(agent_routes) // 3):
        source, target, rank = agent_routes[3 * agent : 3 * agent + 3]
        part = lr[..., source : source + rank] * (agent_ids_T == agent)[:, None].to(lr.dtype)
        routed[..., target : target + rank] += part
    return routed
