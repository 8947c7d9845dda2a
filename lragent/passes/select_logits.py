"""Computes logits only for the rows that are sampled.

Before:                                          After:
    h      = mul(norm, w)          [1, T, D]         h      = mul(norm, w)              [1, T, D]
    logits = linear(h, lm_head)    [1, T, V]         rows   = index_select(h, 1, rows)  [1, R, D]
    return logits                                    logits = linear(rows, lm_head)     [1, R, V]
                                                     return squeeze(float(logits), 0)

The pass walks back from the output through pointwise ops (softcap, casts, scaling) to the linear op of the LM head, and
to its marker if it is adapted. If it finds none, rows are selected at the output: logits are correct, but all rows are
computed.
"""

from __future__ import annotations

import torch
from torch import fx

from lragent.errors import Miss
from lragent.graph.adapter_marker import ADAPTER_MARKER
from lragent.graph.fx_tools import emit, placeholder
from lragent.graph.passes import Pass, PassReport
from lragent.passes.contract import RewriteContext

aten = torch.ops.aten

ROWS = "logits_rows"
_PROJECTIONS = (aten.linear.default, aten.matmul.default)
_POINTWISE = (
    aten.tanh.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.clamp.default,
    aten.neg.default,
)


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    if placeholder(graph, ROWS) is not None:
        return PassReport(0)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    with graph.graph.inserting_after(inputs[-1]):
        rows = graph.graph.placeholder(ROWS)
    output = graph.graph.output_node()
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    head = _head(logits)
    misses: tuple[Miss, ...] = ()
    if head is None:
        misses = (Miss("logits", logits.name, "no linear op found behind the logits; all rows are computed"),)
        with graph.graph.inserting_before(output):
            logits = emit(graph, aten.index_select.default, logits, 1, rows)
    else:
        hidden, users = head
        with graph.graph.inserting_after(hidden):
            selected = emit(graph, aten.index_select.default, hidden, 1, rows)
        for user in users:
            user.replace_input_with(hidden, selected)
    with graph.graph.inserting_before(output):
        wide = emit(graph, aten.to.dtype, logits, torch.float32)
        flat = emit(graph, aten.squeeze.dim, wide, 0)
    output.args = (flat,)
    return PassReport(1, misses)


def _head(logits: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The input of the LM head, and the ops that read it: the linear op, and the marker if the LM head is adapted.

    None if other than pointwise ops follow the LM head, or if the ops read different inputs.
    """
    stack, heads, seen = [logits], list[fx.Node](), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _PROJECTIONS:
            heads.append(node)
        elif node.target is ADAPTER_MARKER:
            _, without_adapter, _ = node.args
            assert isinstance(without_adapter, fx.Node)
            heads.append(node)
            stack.append(without_adapter)
        elif node.target in _POINTWISE:
            tensors = [a for a in node.args if isinstance(a, fx.Node) and a.op == "call_function"]
            if not tensors:
                return None
            stack.extend(tensors)
        else:
            return None
    inputs = {node.args[0] for node in heads}
    if len(inputs) != 1:
        return None
    hidden = inputs.pop()
    assert isinstance(hidden, fx.Node)
    return hidden, heads


SELECT_LOGITS = Pass("select_logits", _run)
