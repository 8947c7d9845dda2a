"""Replaces positions that the graph computes as arange(T) by the position input.

Before:                                          After:
    n   = sym_size(input_ids, 1)                     row = select(position_ids, 0, 0)    [T]
    row = arange(0, n)            [T]                at  = add(row, 2)                   [T]
    at  = add(row, 2)             [T]                e   = embedding(table, at)          [T, D]
    e   = embedding(table, at)    [T, D]

A value is a row count if it depends on the number of tokens only and equals arange(T) plus a constant for several T. A
row count that indexes a tensor is kept, because it selects rows of that tensor. The caller checks afterwards that
tokens do not depend on each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lragent.capture.context import CaptureContext
from lragent.errors import Miss
from lragent.graph.fx_tools import dependents, drop_metadata_asserts, emit
from lragent.graph.passes import Pass, PassReport
from lragent.probing.position_offset import POSITIONS

# Ops that read only the shape of a tensor.
_OF_SHAPE = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_full.default,
}


_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.gather.default, torch.ops.aten.index_select.default}


def _run(graph: fx.GraphModule, context: CaptureContext) -> PassReport:
    drop_metadata_asserts(graph)
    graph.graph.eliminate_dead_code()
    counting = _counting_nodes(graph)
    indexing = [node for node in counting if _indexes_rows(node)]
    positions = next(n for n in graph.graph.nodes if n.op == "placeholder" and n.target == POSITIONS)
    for node, first in counting.items():
        if node in indexing:
            continue
        with graph.graph.inserting_after(node):
            shape = node.meta["val"].shape
            given = positions if len(shape) == 2 else emit(graph, torch.ops.aten.select.int, positions, 0, 0)
        with graph.graph.inserting_after(node if given is positions else given):
            moved = emit(graph, torch.ops.aten.add.Tensor, given, first)
        node.replace_all_uses_with(moved)
        moved.meta["val"] = node.meta["val"]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    misses = (Miss("row count", node.name, "it indexes a tensor, so it is kept as a row number") for node in indexing)
    return PassReport(len(counting) - len(indexing), tuple(misses))


def _counting_nodes(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """Row counts of the graph: nodes equal to arange(T) + c, with their c."""
    fixed = _independent_of_values(graph.graph)
    starts: dict[fx.Node, list[int | None]] = {}
    for tokens in (5, 8):
        for node, value in _values(graph, tokens).items():
            if node in fixed:
                starts.setdefault(node, []).append(_count_start(value, tokens))
    return {
        node: found[0] for node, found in starts.items() if found[0] is not None and all(s == found[0] for s in found)
    }


def _indexes_rows(node: fx.Node) -> bool:
    """True if a row count is used to index a tensor."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_floating_point():
        return False
    return any(user.target in _INDEXING or _indexes_rows(user) for user in node.users)


def _count_start(value: Any, tokens: int) -> int | None:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return None
    if value.shape not in ((tokens,), (1, tokens)):
        return None
    flat = value.reshape(-1)
    return int(flat[0]) if torch.equal(flat - flat[0], torch.arange(tokens).to(flat.dtype)) else None


def _independent_of_values(graph: fx.Graph) -> set[fx.Node]:
    """Call nodes that depend on no value of an input, only on its shape."""
    dependent = dependents(
        graph, lambda node: node.op in ("placeholder", "get_attr"), lambda node: node.target in _OF_SHAPE
    )
    return {node for node in graph.nodes if node.op == "call_function" and node not in dependent}


def _values(graph: fx.GraphModule, tokens: int) -> dict[fx.Node, Any]:
    """Values of all nodes in a forward of `tokens` tokens."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(graph).run(torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None])
    return values


POSITIONS_FROM_INPUT = Pass("positions_from_input", _run)
