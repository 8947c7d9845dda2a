"""Facts that rewriting and lowering passes read, and results that they hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor, fx

from lragent.graph.attention_marker import KEY, VALUE
from lragent.loading.adapter_weights import ReplacedRows
from lragent.program.adapter_map import AttentionConstant, RoutedConstants
from lragent.program.cache_schema import BaseStreams, Layout, LowRankStream


@dataclass(frozen=True)
class Adapter:
    """One agent's weights on one projection: `y = gain * (base(x) + (x @ A.T + ones) @ B.T)`.

    A is `[r, in]`, B is `[out, r]`.

    Args:
        b: with the scaling folded in.
        ones: `[r]`, 1 where the LR number is the constant 1 (its row of A is zero, its column of B is a bias); None: no
            constant.
        gain: `[out]`; None: 1.
    """

    a: Tensor
    b: Tensor
    ones: Tensor | None = None
    gain: Tensor | None = None


@dataclass(frozen=True)
class RoutedLinear:
    """A projection with adapters after `route_adapters`.

    Args:
        base, low_rank: its base output and `x @ A_cat.T` (`[1, T, R]`) as nodes.
        gain_NC: factor of each output by agent id, `[N + 1, out]`, row 0 ones; None if all are 1.
        replaced: True if an agent replaces rows of the weight. Then the base output is not the same for all agents.
    """

    module: str
    base: fx.Node
    low_rank: fx.Node | None
    stream: LowRankStream
    gain_NC: Tensor | None = None
    replaced: bool = False


class Side(Enum):
    """Side of an attention op; its value names the side's argument of the attention marker."""

    KEY = KEY
    VALUE = VALUE


@dataclass(frozen=True)
class SplitStream:
    """One side (K or V) of an attention op in split layout.

    Args:
        base: node of the base stream, `[1, H, T, D]`.
        routed: the projection whose LR stream belongs to this side; None if it has no adapter.
        lora_b: B per agent and head, described by its name and its path from the projections; None without adapter.
        transform: the key transform applied to the LR part (and to the base, if not `final`); None for V.
    """

    base: fx.Node
    routed: RoutedLinear | None = None
    lora_b: AttentionConstant | None = None
    transform: KeyTransform | None = None


@dataclass(frozen=True)
class KeyTransform:
    """f between the K projection and attention: optional RMSNorm over the head dim, then an optional rotation.

    Args:
        kind: "linear" (no dependence on position), "rotary", "norm", "wide norm" (over all heads), "norm+rotary", ...
        final: the base key is cached after f (f is linear).
        cos_PD, sin_PD: rotation tables `[positions, D]`; partner_D: which channel `sin` takes.
        norm_weight_D, norm_eps: RMSNorm before the rotation; a weight `[H, D]` means one norm over all heads.
    """

    kind: str
    final: bool = True
    cos_PD: Tensor | None = None
    sin_PD: Tensor | None = None
    partner_D: Tensor | None = None
    norm_weight_D: Tensor | None = None
    norm_eps: float = 0.0


@dataclass
class PassState:
    """Results that rewriting passes hand to later ones, beside the graph itself."""

    split: dict[str, tuple[SplitStream, SplitStream]] = field(default_factory=dict)  # by marker node name
    base_streams: tuple[BaseStreams, ...] = ()
    low_rank_streams: tuple[LowRankStream, ...] = ()
    routed: list[RoutedConstants] = field(default_factory=list)
    lora_b: list[AttentionConstant] = field(default_factory=list)


@dataclass(frozen=True)
class RewriteContext:
    """Facts of the loaded model that rewriting passes read; `state` is the one part that they write.

    Args:
        agents: names in order; agent id = index + 1.
        adapters: projection FQN -> agent name -> weights.
        embeddings: FQN of each adapted embedding -> how many tokens it has.
        rows: projection FQN -> agent name -> rows of the weight that the agent replaces.
        groups: FQN of each projection in `adapters` -> for each agent, the first agent whose A it shares (`groups_of`).
    """

    layout: Layout
    agents: tuple[str, ...]
    adapters: Mapping[str, Mapping[str, Adapter]]
    max_positions: int
    embeddings: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, ReplacedRows]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    state: PassState = field(default_factory=PassState)


@dataclass(frozen=True)
class LowerContext:
    """Facts that lowering passes read: the name of the graph of an attention implementation (`dispatch.graphs`)."""

    attention: str


ROUTED = "lragent_routed"  # key in node.meta of a routed projection's output: RoutedLinear


def routed_linear(node: fx.Node) -> RoutedLinear | None:
    """The adapters of a node that is the output of a routed projection; None for other nodes."""
    found = node.meta.get(ROUTED)
    return found if isinstance(found, RoutedLinear) else None
