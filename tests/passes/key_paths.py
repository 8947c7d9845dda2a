"""Computations between the key projection and attention of a tiny model (`tiny_lm.Tiny`), for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.passes.tiny_lm import DIM, rms_norm, rotate


def interleaved(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    frequencies = 100.0 ** (-torch.arange(0, DIM, 2).float() / DIM)
    angles = (positions[..., None].float() * frequencies).repeat_interleave(2, -1)[:, :, None]
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + swapped * angles.sin()


def partial(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    angles = positions[..., None].float() * torch.tensor([1.0, 0.1])
    cos, sin = torch.cat([angles.cos()] * 2, -1)[:, :, None], torch.cat([angles.sin()] * 2, -1)[:, :, None]
    turned, kept = x[..., :4], x[..., 4:]
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, kept], -1)


def scaled_rotation(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return 1.25 * rotate(x, positions, module)


def norm_then_rotate(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return rotate(rms_norm(x, positions, module), positions, module)


def norm_over_heads(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    weight = torch.cat([module.key_norm, 2 * module.key_norm])
    flat = x.flatten(-2)
    return (weight * flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-6)).unflatten(-1, (2, DIM))


def norm_over_heads_then_rotate(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return rotate(norm_over_heads(x, positions, module), positions, module)


def clipped(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return x.clamp(-0.5, 0.5)
