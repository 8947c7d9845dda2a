"""The contract of a pass: what it gets, what it reports, how it finds and adds things in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, fx

from lragent.errors import Miss
from lragent.loading.adapter_weights import ReplacedRows
from lragent.program.cache_schema import BaseStreams, Layout, LowRankStream


@dataclass(frozen=True)
class PassReport:
    """The result of a pass: how many places it changed, and the places where it did not match."""

    changed: int
    misses: tuple[Miss, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """One agent's weights on one projection: `y = gain * (base(x) + (x A + ones) B)`; A `[r, in]`, B `[out, r]`.

    Args:
        b: with the scaling folded in.
        ones: `[r]`, 1 at a column that is the constant one (its row of A is zero, its B is a bias); None: no such.
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
        replaced: some agent has weights of its own for some outputs, so the base output is not every agent's.
    """

    module: str
    base: fx.Node
    low_rank: fx.Node | None
    stream: LowRankStream
    gain_NC: Tensor | None = None
    replaced: bool = False


@dataclass(frozen=True)
class SplitStream:
    """One side (K or V) of an attention op in split layout.

    Args:
        base: node of the base stream, `[1, H, T, D]`.
        routed: the projection whose LR columns belong to it; None if it has no adapter.
        up_NHrD: per-agent, per-head up-projections `[N + 1, H, r, D]`, row 0 zero; None without adapter.
        transform: the key transform applied to the LR part (and to the base, if not `final`); None for V.
    """

    base: fx.Node
    routed: RoutedLinear | None = None
    up_NHrD: Tensor | None = None
    transform: KeyTransform | None = None


@dataclass(frozen=True)
class KeyTransform:
    """f between the K projection and attention: optional RMSNorm over the head dim, then an optional rotation.

    Args:
        kind: "linear" (no dependence on position), "rotary", "norm", "wide norm" (over all heads), or a norm "+rotary".
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


@dataclass(frozen=True)
class RewriteContext:
    """Facts of the loaded model that rewriting passes read; `state` is the one part that they write.

    Args:
        agents: names in order; agent id = index + 1.
        adapters: projection FQN -> agent name -> weights.
        lora_parameters: FQN of a captured lora_A / lora_B weight -> (projection FQN, "a" or "b").
        captured_scaling: projection FQN -> scalings that may stand in its captured chains.
        rows: projection FQN -> agent name -> outputs (of an embedding: tokens) with weights of the agent's own.
        groups: projection FQN -> for each agent, the first agent whose A it shares; empty: whoever has an equal A.
    """

    layout: Layout
    agents: tuple[str, ...]
    adapters: Mapping[str, Mapping[str, Adapter]]
    lora_parameters: Mapping[str, tuple[str, str]]
    captured_scaling: Mapping[str, frozenset[float]]
    max_positions: int
    rows: Mapping[str, Mapping[str, ReplacedRows]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    state: PassState = field(default_factory=PassState)

    def lora_side(self, node: object) -> tuple[str, str] | None:
        """(projection FQN, "a" or "b") of a `get_attr` node of a captured adapter weight; None for any other node."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        # Names in the graph are those of the model, under the attribute of the exported wrapper.
        return self.lora_parameters.get(str(node.target).partition(".")[2])


@dataclass(frozen=True)
class LowerContext:
    """Facts that lowering passes read: the name of the graph of an attention implementation (`dispatch.graphs`)."""

    attention: str


Context = TypeVar("Context", RewriteContext, LowerContext)


@dataclass(frozen=True)
class Pass(Generic[Context]):
    """A named rewrite of the graph in place.

    Args:
        required: every place must match; a miss refuses the program.
        hint: advice to the user when a required pass has missed.
    """

    name: str
    run: Callable[[fx.GraphModule, Context], PassReport]
    required: bool = False
    hint: str = ""


ROUTED = "lragent_routed"  # key in node.meta of a routed projection's output: RoutedLinear


def routed_linear(node: fx.Node) -> RoutedLinear | None:
    found = node.meta.get(ROUTED)
    return found if isinstance(found, RoutedLinear) else None
