"""Replaces attention that a model writes out by the marker op.

Before:                                              After:
    s = matmul(q, kT)            [1, H, T, T]            k = transpose(kT, -1, -2)                       [1, H, T, D]
    s = add(mul(s, 0.25), mask)                          o = attention_marker(q, k, v, ..., 0.25)    [1, T, H, D]
    p = softmax(s, -1)                                   o = transpose(o, 1, 2)                      [1, H, T, D]
    o = matmul(p, v)             [1, H, T, D]

The ops between the product and the softmax are not matched one by one. They are evaluated on probe products and must
reduce to a constant scale, a causal or sliding-window mask, and ALiBi slopes (a bias that is linear in the key
position, one slope per head). Other attention is kept unchanged and reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from lragent.capture.context import CaptureContext
from lragent.errors import Miss
from lragent.graph.fx_tools import depends_on_ids, drop_metadata_asserts, emit, evaluate, in_order
from lragent.graph.passes import Pass, PassReport
from lragent.kernels.ops import attention_marker

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_BETWEEN = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.dropout.default, aten.alias.default,
            aten.contiguous.default, aten.clone.default, aten.view.default, aten.reshape.default,
            aten._unsafe_view.default, aten.expand.default)  # fmt: skip
# Scores below this are masked.
HIDDEN = -1e4
MOST_TOKENS = 4096


@dataclass(frozen=True)
class _Scores:
    """Scale, window (0: none) and ALiBi slopes between the product of queries and keys and the softmax."""

    scale: float
    window: int
    slopes_H: Tensor | None


class NotRecognized(Exception):
    """Attention has more than a scale, a mask and slopes; the message is the reason."""


def _run(graph: fx.GraphModule, context: CaptureContext) -> PassReport:
    changed, misses = 0, list[Miss]()
    drop_metadata_asserts(graph)
    for node in list(graph.graph.nodes):
        try:
            if node.target in _SOFTMAX:
                changed += _mark_softmax(graph, node, changed, context.max_positions)
            elif node.target is aten.scaled_dot_product_attention.default:
                changed += _mark_fused(graph, node, changed, context.max_positions)
        except NotRecognized as error:
            misses.append(Miss(f"attention {changed + len(misses)}", node.name, str(error)))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return PassReport(changed, tuple(misses))


def _mark_softmax(graph: fx.GraphModule, softmax: fx.Node, layer: int, max_positions: int) -> int:
    weighted = _product_below(softmax)
    if weighted is None:
        return 0
    product = _product_above(softmax)
    first = 1 if product.target is aten.baddbmm.default else 0
    query, key_T = product.args[first], product.args[first + 1]
    value = weighted.args[1]
    assert isinstance(query, fx.Node) and isinstance(key_T, fx.Node) and isinstance(value, fx.Node)
    heads = int(product.meta["val"].shape[-3])
    scores = _scores(graph, softmax, product, heads, max_positions)
    with graph.graph.inserting_before(weighted):
        key = emit(graph, aten.transpose.int, key_T, -1, -2)
        key.meta["val"] = key_T.meta["val"].transpose(-1, -2)
        _replace(graph, weighted, query, key, value, scores, layer)
    return 1


def _mark_fused(graph: fx.GraphModule, node: fx.Node, layer: int, max_positions: int) -> int:
    query, key, value, *rest = node.args
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    causal = rest[2] if len(rest) > 2 else node.kwargs.get("is_causal", False)
    scale = node.kwargs.get("scale")
    factor = float(scale) if isinstance(scale, (int, float)) else int(query.meta["val"].shape[-1]) ** -0.5
    heads = int(query.meta["val"].shape[-3])
    window, slopes = 0, None
    if isinstance(mask, fx.Node):
        tokens = min(max_positions, MOST_TOKENS)
        bias = evaluate(graph, mask, tokens, {})
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape).masked_fill(~bias, float("-inf"))
        window, slopes = _mask_and_slopes(bias, heads, tokens)
    elif not causal:
        raise NotRecognized("attention has no causal mask")
    with graph.graph.inserting_before(node):
        _replace(graph, node, query, key, value, _Scores(factor, window, slopes), layer)
    return 1


def _replace(
    graph: fx.GraphModule, end: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, scores: _Scores, layer: int
) -> None:
    """Replaces `end` (`[1, H, T, D]` or `[H, T, D]`) by a marker op at the insertion point."""

    call = partial(emit, graph)

    def four(node: fx.Node) -> fx.Node:
        shape = node.meta["val"].shape
        if len(shape) == 4 and shape[0] == 1:
            return node
        if len(shape) != 3:
            raise NotRecognized("attention is not over [heads, tokens, channels]")
        wide = call(aten.unsqueeze.default, node, 0)
        wide.meta["val"] = node.meta["val"].unsqueeze(0)
        return wide

    slopes = None
    if scores.slopes_H is not None:
        name = f"attention_slopes_{layer}"
        graph.register_buffer(name, scores.slopes_H)
        slopes = graph.graph.get_attr(name)
    query, key, value = four(query), four(key), four(value)
    arguments = in_order(
        attention_marker,
        query_1HqTDk=query,
        key_1HTDk=key,
        value_1HTDv=value,
        sinks_Hq=None,
        layer=layer,
        scale=scores.scale,
        window=scores.window,
        softcap=0.0,
        slopes_Hq=slopes,
    )
    out = call(attention_marker, *arguments)
    q, v = query.meta["val"], value.meta["val"]
    out.meta["val"] = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    back = call(aten.transpose.int, out, 1, 2)
    if end.meta["val"].dim() == 3:
        back = call(aten.squeeze.dim, back, 0)
    back.meta["val"] = end.meta["val"]
    end.replace_all_uses_with(back)
    graph.graph.erase_node(end)


def _product_below(node: fx.Node) -> fx.Node | None:
    """The product of probabilities and values."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in (aten.matmul.default, aten.bmm.default) and user.args[0] is node:
            return user
        if user.target not in _BETWEEN or user.args[0] is not node:
            return None
        node = user
    return None


def _product_above(softmax: fx.Node) -> fx.Node:
    """The product of queries and keys: the only value that depends on token ids among the inputs of the scores."""
    id_dependent = depends_on_ids(softmax.graph)
    node = softmax
    while True:
        sources = [n for n in node.all_input_nodes if n in id_dependent]
        if len(sources) != 1:
            raise NotRecognized("attention scores depend on tokens by more than a product of queries and keys")
        node = sources[0]
        if node.target in _PRODUCTS:
            return node


def _scores(graph: fx.GraphModule, softmax: fx.Node, product: fx.Node, heads: int, max_positions: int) -> _Scores:
    """Evaluates the ops between product and softmax on zeros and on a random product."""
    end = softmax.args[0]
    assert isinstance(end, fx.Node)
    if product.target is aten.baddbmm.default:
        factors = float(product.kwargs.get("beta", 1.0)), float(product.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
        added = product.args[0]
        assert isinstance(added, fx.Node)
    else:
        factors, added = (0.0, 1.0), None

    def run(z: Tensor) -> Tensor:
        beta, alpha = factors
        value = alpha * z if added is None else alpha * z + beta * evaluate(graph, added, z.shape[-1], {})
        scores: Tensor = evaluate(graph, end, z.shape[-1], {product: value})
        return scores.float().reshape(-1, z.shape[-1], z.shape[-1])

    dim = product.meta["val"].dim()
    few = 8
    shape = (1,) * (dim - 3) + (heads, few, few)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator)
    bias, scored = run(torch.zeros(shape)), run(z)
    ratio = ((scored - bias) / z.reshape(-1, few, few))[bias > HIDDEN]
    scale = float(ratio.median())
    if not torch.allclose(ratio, torch.full_like(ratio, scale), rtol=1e-3, atol=1e-5):
        raise NotRecognized("scores pass through more than a constant factor before the softmax")
    tokens = min(max_positions, MOST_TOKENS)
    one = run(torch.zeros((1,) * (dim - 3) + (heads, tokens, tokens))) if heads * tokens**2 < 1 << 28 else bias
    window, slopes = _mask_and_slopes(one, heads, one.shape[-1])
    return _Scores(_nearest(scale), window, slopes)


def _nearest(scale: float) -> float:
    """Rounds a measured scale to 1 or to `1 / sqrt(n)` for an integer n, if one of them is close enough."""
    if abs(scale - 1) < 1e-5:
        return 1.0
    square = round(1 / scale**2)
    return square**-0.5 if square > 0 and abs(square**-0.5 - scale) < 1e-5 * scale else scale


def _mask_and_slopes(bias: Tensor, heads: int, tokens: int) -> tuple[int, Tensor | None]:
    """Window (0: none) and ALiBi slopes of an additive bias `[..., 1 or H, 1 or T, T]`.

    Raises:
        NotRecognized: the bias is not a causal or sliding-window mask plus slopes.
    """
    bias_HTT = bias.float().reshape(-1, *bias.shape[-2:]).expand(-1, tokens, tokens)
    seen_HTT = bias_HTT > HIDDEN
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    window = int(seen_HTT[0, -1].sum())
    expected = j <= i
    if window < tokens:
        expected = expected & (j > i - window)
    if not bool((seen_HTT == expected).all()):
        raise NotRecognized("attention has a mask that is neither causal nor a sliding window")
    last_HT = bias_HTT[:, -1] if window == tokens else bias_HTT[:, window - 1]
    slopes_H = last_HT[:, 1] - last_HT[:, 0] if tokens > 1 else last_HT[:, 0] * 0
    line_HTT = slopes_H[:, None, None] * j
    rest = torch.where(expected, bias_HTT - line_HTT, 0.0)
    row = torch.where(i == j, rest, 0.0).sum(-1, keepdim=True)
    off = torch.where(expected, rest - row, 0.0).abs().max()
    if float(off) > 1e-4 * max(1.0, float(torch.where(expected, bias_HTT, 0.0).abs().max())):
        raise NotRecognized("attention adds a bias that is not linear in the position")
    if not bool((slopes_H != 0).any()):
        return (window if window < tokens else 0), None
    return (window if window < tokens else 0), slopes_H.expand(heads).contiguous().clone()


RECOGNIZE_ATTENTION = Pass("recognize_attention", _run, required=True, hint="Such a model can't be converted yet.")
