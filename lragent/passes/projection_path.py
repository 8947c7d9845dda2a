"""The path between a projection and what attention receives: found by walking back, cut out as a function f.

f takes the projection's output `x [1, T, out]` and `positions [1, T]`; everything else on the path must be a constant.
Nodes that depend on positions alone (rotary angles) belong to f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lragent.passes.base import Miss, RoutedLinear, routed_linear

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
POSITIONS = "position_ids"


@dataclass(frozen=True)
class ProjectionPath:
    """From the output of one routed projection (`routed`, its node `total`) to `end`, over `nodes` in graph order."""

    routed: RoutedLinear
    total: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    def function(self, graph: fx.GraphModule) -> Callable[[Tensor, Tensor], Tensor]:
        """f as something that runs: `(x [1, n, out], positions [1, n]) -> [1, H, n, D]`."""
        cut = fx.Graph()
        x, positions = cut.placeholder("x"), cut.placeholder("positions")
        length = cut.call_function(aten.sym_size.int, (x, 1))
        copied: dict[fx.Node, fx.Node] = {self.total: x}
        for node in self.nodes:
            if node.op == "placeholder":
                copied[node] = positions
            elif node.target in _SIZES and node.args[0] not in copied:
                copied[node] = length
            else:
                copied[node] = cut.node_copy(node, lambda n: copied[n])
        cut.output(copied[self.end])
        return fx.GraphModule(graph, cut)

    def rebuild_on(self, graph: fx.GraphModule, source: fx.Node) -> fx.Node:
        """Repeats the path in the graph on another source (the base output); returns its end."""
        copied: dict[fx.Node, fx.Node] = {self.total: source}
        dependent = {self.total}
        for node in self.nodes:
            if not any(n in dependent for n in node.all_input_nodes):
                continue
            dependent.add(node)
            with graph.graph.inserting_before(self.end):
                copied[node] = graph.graph.node_copy(node, lambda n: copied.get(n, n))
        return copied[self.end]


def adapted_path(end: fx.Node, where: str) -> ProjectionPath | Miss | None:
    """The path to `end` from its adapted projection; None if no projection on it has an adapter; a Miss if unclear."""
    on_ids = _depends_on_token_ids(end.graph)
    seen: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in on_ids and (routed_linear(node) is not None or node.target in _PROJECTIONS):
            sources.add(node)
            continue
        if node.target in _SIZES and node not in on_ids:
            continue
        stack.extend(node.all_input_nodes)
    adapted = [node for node in sources if routed_linear(node) is not None]
    if not adapted:
        return None
    if len(sources) > 1:
        names = ", ".join(sorted(n.name for n in sources))
        return Miss(where, end.name, f"it is computed from {len(sources)} projections ({names})")
    total = adapted[0]
    path = [n for n in end.graph.nodes if n in seen and n is not total]
    foreign = [n for n in path if n.op == "placeholder" and n.target != POSITIONS]
    if foreign:
        return Miss(where, end.name, f"it depends on the graph input {foreign[0].target} past its projection")
    routed = routed_linear(total)
    assert routed is not None
    return ProjectionPath(routed, total, end, tuple(path))


def _depends_on_token_ids(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values (not only shapes) depend on token ids."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.target not in (POSITIONS, "agent_ids", "logits_rows"):
                dependent.add(node)
        elif node.target not in _SIZES and any(n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    return dependent
