"""split_kv: key transforms that are derived, and keys that are refused next to a near miss that splits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.passes.stages import split_report
from tests.passes.tiny_lm import DIM, Path, clipped, keep, rms_norm, rotate


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


@pytest.mark.parametrize(
    ("key_path", "kind"),
    [
        (keep, "linear"),
        (rotate, "rotary"),
        (interleaved, "rotary"),
        (partial, "rotary"),
        (scaled_rotation, "rotary"),
        (rms_norm, "norm"),
        (norm_then_rotate, "norm+rotary"),
        (norm_over_heads, "wide norm"),
        (norm_over_heads_then_rotate, "wide norm+rotary"),
    ],
    ids=lambda p: p.__name__ if callable(p) else p,
)
def test_key_transforms_are_derived(key_path: Path, kind: str) -> None:
    report, state = split_report(key_path=key_path)
    assert report.misses == ()
    key, _ = next(iter(state.split.values()))
    assert key.transform.kind == kind
    assert key.transform.final == ("norm" not in kind)


def centred_norm(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return rms_norm(x - x.mean(-1, keepdim=True), positions, module)


def head_mixing(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return rotate(x + x.flip(-1), positions, module)


@pytest.mark.parametrize(
    ("refused", "reason", "splits"),
    [
        (clipped, "not linear, and not a norm of each head", keep),
        (centred_norm, "are zero for an input of ones", rms_norm),
        (head_mixing, "is not one channel of the projection", rotate),
    ],
    ids=lambda p: p.__name__ if callable(p) else None,
)
def test_refused_keys_and_their_near_miss(refused: Path, reason: str, splits: Path) -> None:
    report, _ = split_report(key_path=refused)
    assert [miss.where for miss in report.misses] == ["layer 0 key", "layer 1 key"]
    assert all(reason in miss.reason and miss.node for miss in report.misses)
    near, _ = split_report(key_path=splits)
    assert near.misses == ()
