"""Derives the key transform f between a K (or V) projection and attention by probing f, and verifies it.

f maps the projection's output and positions to keys. It runs as captured, in the model's own dtype. Names are not used.
The derivation has five steps:

1. Check that f is token-wise: reordered tokens give reordered outputs, and fewer tokens give the same outputs.
2. Find the input channel of each output channel. Inputs are +1 and -1 in a binary code, at position 0, where a rotation
   is the identity and every RMSNorm has the same mean square.
3. Check if f is linear and if it depends on positions. If both, find the pairs of rotated channels, then cos and sin
   of all positions from two inputs.
4. If f is not linear, check that scaling its input leaves it unchanged (a norm). Find out if the norm is per head or
   over all heads, its weight and its eps, then the rotation as in step 3.
5. Compare the rebuilt f with f on random tokens, scales and positions. If they differ, f is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lragent.passes.contract import KeyTransform
from lragent.program.adapter_map import HeadMap

Transform = Callable[[Tensor, Tensor], Tensor]

POSITIONS_PER_CALL = 2048
CHECKED_TOKENS = 64


class Underivable(Exception):
    """f is of no known kind; the message is the reason."""


@dataclass(frozen=True)
class Probe:
    """f, the number of its input channels, the dtype of its input, and the number of positions of the model."""

    f: Transform
    channels: int
    dtype: torch.dtype
    max_positions: int

    def __call__(self, x_nC: Tensor, positions: Tensor | int) -> Tensor:
        """Runs f on n tokens: `[n, channels] -> [n, H, D]` in float64; f runs in `dtype`."""
        at = torch.full((x_nC.shape[0],), positions) if isinstance(positions, int) else positions
        with torch.no_grad():
            out = self.f(x_nC[None].to(self.dtype), at[None])
        return out[0].transpose(0, 1).to(torch.float64)

    def random(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.channels, generator=generator)
        return x, torch.randint(0, self.max_positions, (tokens,), generator=generator)

    def allowed(self, reference: Tensor) -> float:
        """Bound of the rounding difference between two orders of the same few operations."""
        return 32 * torch.finfo(self.dtype).eps * max(float(reference.abs().max()), 1e-30)

    def same(self, left: Tensor, right: Tensor) -> bool:
        return float((left - right).abs().max()) <= self.allowed(left)


def derive_value(probe: Probe) -> None:
    """Checks that f of V is linear, token-wise and independent of positions, so that it can be applied to B.

    Raises:
        Underivable: it is not; the message is the reason.
    """
    _require_token_wise(probe)
    if not _is_linear(probe):
        raise Underivable("the value passes through a computation that is not linear")
    if _uses_positions(probe):
        raise Underivable("the value depends on the position")


def derive_key(probe: Probe) -> tuple[KeyTransform, Tensor | None]:
    """Derives the key transform.

    Returns:
        The transform, and the input channel of each key channel, int64 `[H, D]`; None instead of the channels if f is
        linear and independent of positions, so that f itself is applied to B.

    Raises:
        Underivable: f is of no known kind; the message is the reason.
    """
    _require_token_wise(probe)
    linear, positional = _is_linear(probe), _uses_positions(probe)
    if linear and not positional:
        return KeyTransform("linear"), None
    channel_HD = _channels_at_zero(probe)
    norm = None if linear else _norm(probe, channel_HD)
    norm_kind = "" if norm is None else "wide norm" if norm[0].dim() == 2 else "norm"
    found = KeyTransform(
        kind=norm_kind or "rotary",
        final=linear,
        norm_weight_D=norm[0] if norm else None,
        norm_eps=norm[1] if norm else 0.0,
    )
    if positional:
        partner_D = _partners(probe, channel_HD)
        cos_PD, sin_PD = _tables(probe, channel_HD, partner_D, norm)
        found = KeyTransform(
            kind=f"{norm_kind}+rotary" if norm else "rotary",
            final=linear,
            cos_PD=cos_PD.to(torch.float32),
            sin_PD=sin_PD.to(torch.float32),
            partner_D=partner_D,
            norm_weight_D=found.norm_weight_D,
            norm_eps=found.norm_eps,
        )
    _verify(probe, found, channel_HD)
    return found, channel_HD


def head_map(probe: Probe) -> HeadMap:
    """Describes a linear f that does not depend on positions, so that it can be applied to rows of B.

    Each head channel is usually one channel of the projections, sometimes with a factor. Any other f becomes a matrix.
    """
    ones_HD = probe(torch.ones(1, probe.channels), 0)[0]
    try:
        channel_HD = _channels_at_zero(probe)
    except Underivable:
        return HeadMap(None, dense_CHD=probe(torch.eye(probe.channels), 0))
    found = HeadMap(channel_HD, None if bool((ones_HD == 1).all()) else ones_HD)
    x, _ = probe.random(CHECKED_TOKENS, seed=9)
    rebuilt = x.to(probe.dtype).double()[:, channel_HD] * (1.0 if found.factor_HD is None else found.factor_HD)
    return found if probe.same(probe(x, 0), rebuilt) else HeadMap(None, dense_CHD=probe(torch.eye(probe.channels), 0))


def apply(transform: KeyTransform, raw_nHD: Tensor, positions_n: Tensor) -> Tensor:
    """Applies the derived f to raw keys per head, in their dtype."""
    key = raw_nHD
    if transform.norm_weight_D is not None:
        mean = key.pow(2).mean((-2, -1) if transform.norm_weight_D.dim() == 2 else -1, keepdim=True)
        key = key * torch.rsqrt(mean + transform.norm_eps) * transform.norm_weight_D.to(key.dtype)
    if transform.cos_PD is not None and transform.sin_PD is not None and transform.partner_D is not None:
        cos = transform.cos_PD[positions_n].to(key.dtype)[:, None]
        sin = transform.sin_PD[positions_n].to(key.dtype)[:, None]
        key = key * cos + key[..., transform.partner_D] * sin
    return key


def _require_token_wise(probe: Probe) -> None:
    x, positions = probe.random(12, seed=1)
    whole = probe(x, positions)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    if not probe.same(whole[order], probe(x[order], positions[order])):
        raise Underivable("it mixes tokens")
    if not probe.same(whole[:5], probe(x[:5], positions[:5])):
        raise Underivable("it depends on the number of tokens")


def _is_linear(probe: Probe) -> bool:
    x, positions = probe.random(16, seed=3)
    y, _ = probe.random(16, seed=4)
    # Powers of two scale exactly, so that only additions round.
    left = probe(4 * x + y, positions)
    right = 4 * probe(x, positions) + probe(y, positions)
    at_zero = probe(torch.zeros_like(x), positions)
    return probe.same(left, right) and float(at_zero.abs().max()) == 0.0


def _uses_positions(probe: Probe) -> bool:
    x, positions = probe.random(16, seed=5)
    return not torch.equal(probe(x, positions), probe(x, 0))


def _channels_at_zero(probe: Probe) -> Tensor:
    """The input channel of each output channel at position 0, from a binary code of signs: `[H, D]`."""
    bits = max(1, math.ceil(math.log2(probe.channels)))
    index = torch.arange(probe.channels)
    signs = [torch.ones(probe.channels)] + [1.0 - 2.0 * ((index >> b) & 1) for b in range(bits)]
    answers = probe(torch.stack(signs), 0)
    ones, coded = answers[0], answers[1:]
    if bool((ones == 0).any()):
        raise Underivable("some key channels are zero for an input of ones")
    if not probe.same(coded.abs(), ones.abs().expand_as(coded)):
        raise Underivable("a key channel at position 0 is not one channel of the projection")
    bit = (coded * ones < 0).long()
    channel = (bit << torch.arange(bits)[:, None, None]).sum(0)
    if int(channel.max()) >= probe.channels:
        raise Underivable("a key channel at position 0 is not one channel of the projection")
    return channel


def _norm(probe: Probe, channel_HD: Tensor) -> tuple[Tensor, float]:
    """Weight and eps of an RMSNorm; the weight is `[D]` for a norm per head, `[H, D]` for one over all heads."""
    x, _ = probe.random(8, seed=6)
    x = 32 * x  # large enough that any usual eps is negligible against the mean square
    plain = probe(x, 0)
    loose = max(1e-3 * float(plain.abs().max()), probe.allowed(plain))
    if float((probe(8 * x, 0) - plain).abs().max()) > loose:
        raise Underivable("it is not linear, and not a norm of each head")
    first_head_wider = x.clone()
    first_head_wider[:, channel_HD[0]] *= 8
    over_all_heads = float((probe(first_head_wider, 0) - plain).abs().max()) > loose
    small = 2.0**-10
    ones = torch.ones(2, probe.channels)
    ones[1] *= small
    large_HD, small_HD = probe(ones, 0)
    ratio = float((small_HD / large_HD).median())
    eps = small**2 * (1 - ratio**2) / max(ratio**2 - small**2, 1e-30)
    eps = _nearest_constant(probe, max(eps, 0.0))
    weight_HD = large_HD * math.sqrt(1 + eps)
    weight_dtype = torch.float32 if probe.dtype != torch.float64 else torch.float64
    if over_all_heads:
        return weight_HD.to(weight_dtype), eps
    if not probe.same(weight_HD, weight_HD[:1].expand_as(weight_HD)):
        raise Underivable("its norm has different weights for different heads")
    return weight_HD[0].to(weight_dtype), eps


def _nearest_constant(probe: Probe, eps: float) -> float:
    """Replaces a measured eps by the nearest constant of f within 10%, if there is one."""
    graph = getattr(probe.f, "graph", None)
    constants = (
        [abs(a) for n in graph.nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)]
        if isinstance(graph, fx.Graph)
        else []
    )
    near = [c for c in constants if c > 0 and abs(c - eps) <= 0.1 * c]
    return min(near, key=lambda c: abs(c - eps)) if near else eps


def _partners(probe: Probe, channel_HD: Tensor) -> Tensor:
    """The channel that a rotation mixes into each channel of a head: `[D]`; the channel itself if there is none."""
    dim = channel_HD.shape[1]
    one_hot = torch.zeros(dim, probe.channels)
    one_hot[torch.arange(dim), channel_HD[0]] = 1.0
    reached = torch.zeros(dim, dim, dtype=torch.bool)  # [output d, input d']
    for position in {1, 2, 5, probe.max_positions // 2, probe.max_positions - 1}:
        reached |= probe(one_hot, max(0, min(position, probe.max_positions - 1)))[:, 0].T != 0
    reached |= torch.eye(dim, dtype=torch.bool)
    if int(reached.sum(1).max()) > 2:
        raise Underivable("a key channel depends on more than two channels of the projection")
    others = reached & ~torch.eye(dim, dtype=torch.bool)
    partner = torch.where(others.any(1), others.long().argmax(1), torch.arange(dim))
    if not torch.equal(partner[partner], torch.arange(dim)):
        raise Underivable("key channels are not rotated in pairs")
    return partner


def _tables(
    probe: Probe, channel_HD: Tensor, partner_D: Tensor, norm: tuple[Tensor, float] | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions, `[positions, D]`. The first channel of each pair is probed, then the second."""
    dim = channel_HD.shape[1]
    first = torch.arange(dim) <= partner_D
    cos = torch.zeros(probe.max_positions, dim, dtype=torch.float64)
    sin = torch.zeros_like(cos)
    for active in (first, ~first):
        if not bool(active.any()):
            continue
        x = torch.zeros(probe.channels)
        x[channel_HD[:, active].reshape(-1)] = 1.0
        gain = torch.ones(dim, dtype=torch.float64)
        if norm is not None:
            first_head_D = norm[0][0] if norm[0].dim() == 2 else norm[0]
            gain = first_head_D.double() / math.sqrt(float(active.sum()) / dim + norm[1])
        for start in range(0, probe.max_positions, POSITIONS_PER_CALL):
            stop = min(start + POSITIONS_PER_CALL, probe.max_positions)
            answer = probe(x.expand(stop - start, -1), torch.arange(start, stop))[:, 0]
            cos[start:stop, active] = answer[:, active] / gain[active]
            mixed = ~active & active[partner_D]
            sin[start:stop, mixed] = answer[:, mixed] / gain[partner_D[mixed]]
    return cos, sin


def _verify(probe: Probe, found: KeyTransform, channel_HD: Tensor) -> None:
    x, positions = probe.random(CHECKED_TOKENS, seed=7)
    positions[0], positions[1] = 0, probe.max_positions - 1
    if found.norm_weight_D is not None:
        x = x * torch.logspace(-3, 1, CHECKED_TOKENS)[:, None]
    expected = probe(x, positions)
    raw = x.to(probe.dtype).double()[:, channel_HD]
    rebuilt = apply(found, raw, positions)
    if not probe.same(expected, rebuilt):
        difference = float((expected - rebuilt).abs().max())
        raise Underivable(f"the derived {found.kind} transform differs from the model's by {difference:.2e}")
