"""Removes ops without effect: metadata asserts, casts to the same dtype, aliases.

Before:                                             After:
    add  = aten.add.Tensor(a, b)      f32[1, T, D]      add  = aten.add.Tensor(a, b)
    _    = _assert_tensor_metadata(add, f32)            view = aten.view(add, [...])
    to   = aten.to.dtype(add, f32)
    view = aten.view(to, [...])

Later passes match chains of nodes and rely on these ops being absent.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from lragent.graph.passes import Pass, PassReport
from lragent.passes.contract import RewriteContext

aten = torch.ops.aten

_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default)
_SAME = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default)


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    changed = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS:
            graph.graph.erase_node(node)
            changed += 1
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            changed += 1
    graph.graph.eliminate_dead_code()
    return PassReport(changed)


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target in _SAME:
        return True
    if node.target is aten.dropout.default:
        return node.args[2] is False or node.args[1] in (0, 0.0)
    if node.target is operator.getitem or node.target not in _CASTS:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and before.layout == after.layout
    )


NORMALIZE = Pass("normalize", _run)
