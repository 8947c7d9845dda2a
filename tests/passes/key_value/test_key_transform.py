"""key_transform: tables, pairs, norm weights and eps are what the function was built from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lragent.passes.key_value.key_transform import Probe, Underivable, apply, derive_key, derive_value

HEADS, DIM, POSITIONS = 2, 8, 50
CHANNELS = HEADS * DIM


def _probe(
    f: Callable[[Tensor, Tensor], Tensor], channels: int = CHANNELS, dtype: torch.dtype = torch.float32
) -> Probe:
    return Probe(lambda x, p: f(x, p), channels, dtype, POSITIONS)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def _angles(positions: Tensor) -> Tensor:
    return positions[:, None, :, None].float() * (50.0 ** (-torch.arange(0, DIM, 2).float() / DIM))


def _rotate(x_1HTD: Tensor, positions: Tensor) -> Tensor:
    angles = torch.cat([_angles(positions)] * 2, -1)
    left, right = x_1HTD.chunk(2, -1)
    return x_1HTD * angles.cos().to(x_1HTD.dtype) + torch.cat([-right, left], -1) * angles.sin().to(x_1HTD.dtype)


def test_rotation_tables_and_pairs() -> None:
    transform, channels = derive_key(_probe(lambda x, p: _rotate(_heads(x), p)))
    assert channels is not None and torch.equal(channels, torch.arange(CHANNELS).view(HEADS, DIM))
    assert transform.partner_D.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    angles = _angles(torch.arange(POSITIONS)[None])[0, 0]
    # Tables are the function's own answers, so they are exact.
    assert torch.equal(transform.cos_PD, torch.cat([angles.cos()] * 2, -1))
    assert torch.equal(transform.sin_PD, torch.cat([-angles.sin(), angles.sin()], -1))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
def test_norm_weight_and_eps(eps: float) -> None:
    weight = torch.rand(DIM) + 0.5

    def norm(x: Tensor, positions: Tensor) -> Tensor:
        heads = _heads(x)
        return weight * heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps)

    transform, _ = derive_key(_probe(norm))
    assert transform.kind == "norm" and not transform.final
    torch.testing.assert_close(transform.norm_weight_D, weight)
    assert transform.norm_eps == pytest.approx(eps, rel=1e-3)


def test_channels_of_a_fused_projection_are_found_wherever_they_are() -> None:
    order = torch.randperm(3 * CHANNELS, generator=torch.Generator().manual_seed(0))[:CHANNELS]
    transform, channels = derive_key(_probe(lambda x, p: _rotate(_heads(x[..., order]), p), 3 * CHANNELS))
    assert transform.kind == "rotary"
    assert channels is not None and torch.equal(channels, order.view(HEADS, DIM))


def test_bfloat16_rotation_is_derived() -> None:
    transform, channels = derive_key(_probe(lambda x, p: _rotate(_heads(x), p), dtype=torch.bfloat16))
    x, positions = torch.randn(20, CHANNELS).bfloat16(), torch.arange(20)
    expected = _rotate(_heads(x[None]), positions[None])[0].transpose(0, 1)
    rebuilt = apply(transform, x[:, channels].float(), positions)
    # The model rounds each product and the sum to bfloat16: three roundings of values near the largest.
    bound = 3 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    assert float((rebuilt - expected.float()).abs().max()) <= bound


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x, p: _heads(x - x.mean(1, keepdim=True)), "mixes tokens|number of tokens"),
        (lambda x, p: _heads(x.cumsum(1)), "mixes tokens"),
        (lambda x, p: _heads(x.tanh()), "not linear, and not a norm"),
        (lambda x, p: _rotate(_heads(x + x.roll(1, -1)), p), "is not one channel"),
        (
            lambda x, p: _rotate(_heads(x), p) + 0.1 * _heads(x.roll(1, -1)) * p[:, None, :, None],
            "more than two channels",
        ),
    ],
    ids=["mean", "cumsum", "tanh", "mixed", "three"],
)
def test_what_is_no_known_transform_says_why(f: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(Underivable, match=reason):
        derive_key(_probe(f))


def test_values_may_be_scaled_but_not_rotated() -> None:
    derive_value(_probe(lambda x, p: 3 * _heads(x)))
    with pytest.raises(Underivable, match="position"):
        derive_value(_probe(lambda x, p: _rotate(_heads(x), p)))
