"""The path from projections to an input of attention: found by walking back from attention, extracted as a function f.

f takes the concatenated outputs of the projections, `x [1, T, sum of outs]`, and `positions [1, T]`. All other inputs
of the path must be constants. Nodes that depend on positions alone (rotary angles) belong to f. There is usually one
projection; the key of latent attention has two, its expanded part and its rotated part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, fx

from lragent.errors import Miss
from lragent.graph.fx_tools import depends_on_ids, emit
from lragent.passes.contract import RoutedLinear, routed_linear
from lragent.probing.position_offset import POSITIONS

aten = torch.ops.aten

_PROJECTIONS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.embedding.default,
)
_SIZES = (aten.sym_size.int,)


@dataclass(frozen=True)
class ProjectionPath:
    """The path from outputs of projections (`sources`, at least one adapted) to `end` over `nodes`, in graph order."""

    sources: tuple[fx.Node, ...]
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def routed(self) -> tuple[RoutedLinear | None, ...]:
        """Adapters per source; None for a source without adapters."""
        return tuple(routed_linear(source) for source in self.sources)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(int(source.meta["val"].shape[-1]) for source in self.sources)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted projections."""
        return tuple(routed.module for routed in self.routed if routed is not None)

    @property
    def starts(self) -> tuple[int, ...]:
        """First channel of each adapted projection among the concatenated outputs."""
        firsts = (0, *accumulate(self.widths))
        return tuple(first for first, routed in zip(firsts, self.routed, strict=False) if routed is not None)

    @property
    def gains(self) -> Tensor | None:
        """Factor per agent id and output, `[N + 1, sum of outs]`; None if all are 1."""
        parts = [routed.gain_NC if routed is not None else None for routed in self.routed]
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return None
        ones = [some.new_ones(some.shape[0], width) for width in self.widths]
        return torch.cat([o if p is None else p for p, o in zip(parts, ones, strict=True)], 1)

    def base(self, graph: fx.GraphModule) -> fx.Node:
        """Adds the concatenated base outputs of the sources, `[1, T, sum of outs]`, before `end`."""
        with graph.graph.inserting_before(self.end):
            flat = [
                flat_tokens(graph, routed.base if routed else source, source)
                for source, routed in zip(self.sources, self.routed, strict=True)
            ]
            return flat[0] if len(flat) == 1 else emit(graph, aten.cat.default, flat, -1)

    def function(self, graph: fx.GraphModule) -> Callable[[Tensor, Tensor], Tensor]:
        """f as a callable: `(x [1, n, sum of outs], positions [1, n]) -> [1, H, n, D]`."""
        cut = fx.Graph()
        x, positions = cut.placeholder("x"), cut.placeholder("positions")
        length = cut.call_function(aten.sym_size.int, (x, 1))
        copied: dict[fx.Node, fx.Node] = {}
        start = 0
        for source, width in zip(self.sources, self.widths, strict=True):
            part = cut.call_function(aten.slice.Tensor, (x, 2, start, start + width))
            shape = [1] * (source.meta["val"].dim() - 2)
            copied[source] = cut.call_function(aten.reshape.default, (part, [*shape, length, width]))
            start += width
        for node in self.nodes:
            if node.op == "placeholder":
                copied[node] = positions
            elif node.target in _SIZES and node.args[0] not in copied:
                copied[node] = length
            else:
                copied[node] = cut.node_copy(node, lambda n: copied[n])
        cut.output(copied[self.end])
        return fx.GraphModule(graph, cut)

    def rebuild_on_base(self, graph: fx.GraphModule) -> fx.Node:
        """Copies the path in the graph, with the base outputs as its sources; returns the end of the copy."""
        copied: dict[fx.Node, fx.Node] = {
            source: routed.base if routed is not None else source
            for source, routed in zip(self.sources, self.routed, strict=True)
        }
        dependent = set(self.sources)
        for node in self.nodes:
            if not any(n in dependent for n in node.all_input_nodes):
                continue
            dependent.add(node)
            with graph.graph.inserting_before(self.end):
                copied[node] = graph.graph.node_copy(node, lambda n: copied.get(n, n))
        return copied[self.end]


def flat_tokens(graph: fx.GraphModule, node: fx.Node, like: fx.Node) -> fx.Node:
    """Reshapes `node`, which has the shape of `like`, to `[1, T, C]` at the insertion point."""
    shape = like.meta["val"].shape
    if len(shape) == 3:
        return node
    return emit(graph, aten.reshape.default, node, [1, -1, int(shape[-1])])


def adapted_path(end: fx.Node, where: str) -> ProjectionPath | Miss | None:
    """The path to `end` from its projections; None if no projection has an adapter; a Miss if there is no such path."""
    id_dependent = depends_on_ids(end.graph, others=(POSITIONS, "agent_ids", "logits_rows"))
    seen: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in id_dependent and (routed_linear(node) is not None or node.target in _PROJECTIONS):
            sources.add(node)
            continue
        if node.target in _SIZES and node not in id_dependent:
            continue
        stack.extend(node.all_input_nodes)
    if not any(routed_linear(node) is not None for node in sources):
        return None
    path = [n for n in end.graph.nodes if n in seen and n not in sources]
    foreign = [n for n in path if n.op == "placeholder" and n.target != POSITIONS]
    if foreign:
        return Miss(where, end.name, f"it depends on the graph input {foreign[0].target} past its projection")
    ordered = tuple(n for n in end.graph.nodes if n in sources)
    for node in ordered:
        if node.target is aten.embedding.default or not _is_by_token(node, end):
            return Miss(where, end.name, f"it is computed from {node.name}, which is not a projection of each token")
    return ProjectionPath(ordered, end, tuple(path))


def _is_by_token(source: fx.Node, end: fx.Node) -> bool:
    """True if a value has the shape `[1, ..., 1, T, C]`."""
    shape = source.meta["val"].shape
    return len(shape) >= 2 and shape[-2] == end.meta["val"].shape[-2] and all(size == 1 for size in shape[:-2])
