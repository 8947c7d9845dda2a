"""K and V of each attention op become a base stream and a low-rank stream.

Before (split layout, K side):                   After:
    y   = linear(x, W)                               y    = linear(x, W)              base output
    lr  = linear(x, A_cat)                           lr   = linear(x, A_cat)          LR stream, to be cached
    y2  = y + routed delta                           k    = f(y)                      base key
    k   = f(y2)                                      attention(q, k, v, ...)          lr, B, f: in the state
    attention(q, k, v, ...)

The key transform f is cut out of the graph, derived by probing and verified (`key_transform.py`). If f is linear, the
cache holds f of the base key. If f contains a norm, the cache holds the raw base key and attention applies f. A
projection without adapter stays as it is. In dense layout nothing is split: the delta is part of K and V.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lragent.errors import Miss
from lragent.graph.attention_marker import has_slopes, marker_nodes
from lragent.graph.fx_tools import add_shared_constant, argument, emit, set_argument
from lragent.graph.passes import Pass, PassReport
from lragent.passes.contract import KeyTransform, RewriteContext, Side, SplitStream
from lragent.passes.key_value.dora_gains import per_head, scale_side
from lragent.passes.key_value.join_streams import join_streams
from lragent.passes.key_value.key_transform import Probe, Underivable, derive_key, derive_value
from lragent.passes.key_value.projection_path import ProjectionPath, adapted_path

aten = torch.ops.aten


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    if context.layout == "dense":
        return PassReport(0)
    misses: list[Miss] = []
    changed = 0
    for index, marker in enumerate(marker_nodes(graph)):
        sides: list[SplitStream] = []
        for side in Side:
            found = _split(graph, context, marker, side, f"layer {index} {side.name.lower()}")
            if isinstance(found, Miss):
                misses.append(found)
                continue
            sides.append(found)
            changed += found.routed is not None
        if len(sides) == 2:
            context.state.split[marker.name] = (sides[0], sides[1])
    # Dead code stays until the cache is attached: only then do the low-rank streams get users.
    return PassReport(changed, tuple(misses))


def _split(
    graph: fx.GraphModule, context: RewriteContext, marker: fx.Node, side: Side, where: str
) -> SplitStream | Miss:
    end = argument(marker, side.value)
    assert isinstance(end, fx.Node)
    path = adapted_path(end, where)
    if path is None:
        return SplitStream(base=end)
    if isinstance(path, Miss):
        return path
    if any(r is not None and (r.replaced or r.low_rank is None) for r in path.routed):
        return Miss(where, end.name, "an agent replaces its whole weight, so there is no base part to share")
    any_b = next(iter(context.adapters[path.modules[0]].values())).b
    probe = Probe(path.function(graph), sum(path.widths), any_b.dtype, context.max_positions)
    try:
        if side is Side.VALUE:
            derive_value(probe)
            transform, channel_HD = None, None
        else:
            transform, channel_HD = derive_key(probe)
        gain_NHD = per_head(probe, path.gains)
    except Underivable as reason:
        return Miss(where, end.name, str(reason))
    if side is Side.KEY and transform is not None and transform.kind != "linear" and has_slopes(marker):
        return Miss(where, end.name, f"its transform is {transform.kind} and scores have a slope by position")
    lora_b_NHrD = _lora_b(probe, path, context, channel_HD)
    base = _base_stream(graph, path, transform, channel_HD)
    set_argument(marker, side.value, base)
    if gain_NHD is not None:
        scale_side(graph, marker, side, gain_NHD)
    return SplitStream(base, join_streams(graph, path), lora_b_NHrD, transform)


def _lora_b(probe: Probe, path: ProjectionPath, context: RewriteContext, channel_HD: Tensor | None) -> Tensor:
    """Computes B per agent and head, `[N + 1, H, r, D]`, row 0 (base) zero.

    A linear f is applied to the columns of B as if they were tokens. Where f rotates, channels are picked by
    `channel_HD`, since attention rotates the sum. With several projections, r counts the ranks of all of them.
    """
    blocks: list[Tensor | None] = [None]
    for name in context.agents:
        parts: list[Tensor] = []
        start = 0
        for routed, width in zip(path.routed, path.widths, strict=True):
            adapter = context.adapters[routed.module].get(name) if routed is not None else None
            if adapter is not None:
                rows_rC = adapter.b.new_zeros(adapter.b.shape[1], sum(path.widths))
                rows_rC[:, start : start + width] = adapter.b.T
                parts.append(rows_rC)
            start += width
        if not parts:
            blocks.append(None)
            continue
        rows_rC = torch.cat(parts)
        heads_rHD = rows_rC[:, channel_HD] if channel_HD is not None else probe(rows_rC, 0).to(rows_rC.dtype)
        blocks.append(heads_rHD.transpose(0, 1))
    some = next(b for b in blocks if b is not None)
    heads, _, dim = some.shape
    stacked = some.new_zeros(len(blocks), heads, max(b.shape[1] for b in blocks if b is not None), dim)
    for row, block in enumerate(blocks):
        if block is not None:
            stacked[row, :, : block.shape[1]] = block
    return stacked


def _base_stream(
    graph: fx.GraphModule, path: ProjectionPath, transform: KeyTransform | None, channel_HD: Tensor | None
) -> fx.Node:
    """Adds the base stream `[1, H, T, D]`: f of the base output, or the raw base key per head if f is not linear."""
    if transform is None or transform.final:
        return path.rebuild_on_base(graph)
    assert channel_HD is not None
    heads, dim = channel_HD.shape
    base = path.base(graph)
    with graph.graph.inserting_before(path.end):
        channels = add_shared_constant(graph, "key_channels", channel_HD.reshape(-1))
        picked = emit(graph, aten.index_select.default, base, 2, channels)
        shaped = emit(graph, aten.unflatten.int, picked, 2, [heads, dim])
        raw = emit(graph, aten.transpose.int, shaped, 1, 2)
    raw.meta["val"] = path.end.meta["val"]
    return raw


SPLIT_KV = Pass(
    "split_kv",
    _run,
    required=True,
    hint="Use layout dense (sharing non_shared or full_shared), or leave these projections out of the adapters.",
)
