"""The constants of a rewritten graph that depend on adapters, and how they follow from each agent's A and B.

Legend: N = agents, H = KV heads, D = head dim, C = output channels of the projections behind one K or V.

`lragent.passes.adapters.constants` computes the constants from this description. Training differentiates through it,
and an update of a live engine's adapters writes the results in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lragent.program.cache_schema import LowRankStream


@dataclass(frozen=True)
class HeadMap:
    """A linear map f from the channels of projections to heads, `[C] -> [H, D]`.

    Args:
        channel_HD: int64, the channel that each head channel takes; None if `dense_CHD` is given.
        factor_HD: float64, a factor per head channel; None: 1.
        dense_CHD: float64, the matrix of any other linear map.
    """

    channel_HD: Tensor | None
    factor_HD: Tensor | None = None
    dense_CHD: Tensor | None = None


@dataclass(frozen=True)
class RoutedConstants:
    """Constants of one routed projection: `lora_a_{index}`, `lora_b_{index}`, `lora_ones_{index}`, `lora_gain_{index}`.

    Args:
        embeds: True for an embedding, whose A is stored as `[tokens, R]`.
        outputs: output features of the projection.
        scale: factor that an embedding applies to its rows, and to those of an adapter.
    """

    index: int
    stream: LowRankStream
    embeds: bool
    outputs: int
    scale: float = 1.0

    @property
    def a(self) -> str:
        return f"lora_a_{self.index}"

    @property
    def b(self) -> str:
        return f"lora_b_{self.index}"

    @property
    def ones(self) -> str:
        return f"lora_ones_{self.index}"


@dataclass(frozen=True)
class AttentionConstant:
    """B per agent and head, `[N + 1, H, r, D]`, of one side (K or V) of an attention op.

    Args:
        modules: the adapted projections behind this side, in the order in which their ranks follow each other.
        starts: first of each projection's channels among the C input channels of `heads`.
        channels: C.
        padding: zero channels that follow the D channels of the map (ALiBi slopes).
    """

    name: str
    modules: tuple[str, ...]
    starts: tuple[int, ...]
    channels: int
    heads: HeadMap
    padding: int = 0


@dataclass(frozen=True)
class AdapterMap:
    """All constants of a graph that follow from A and B.

    Args:
        fixed: modules of which some constant depends on an adapter in another way (DoRA's gain, replaced rows).
    """

    routed: tuple[RoutedConstants, ...]
    attention: tuple[AttentionConstant, ...]
    fixed: tuple[str, ...] = ()
