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
from lragent.passes.key_value.key_transform import Probe, Underivable, derive_key, derive_value, head_map
from lragent.passes.key_value.projection_path import ProjectionPath, adapted_path
from lragent.program.adapter_map import AttentionConstant, HeadMap

aten = torch.ops.aten


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    if context.layout == "dense":
        return PassReport(0)
    misses: list[Miss] = []
    changed = 0
    for index, marker in enumerate(marker_nodes(graph)):
        sides: list[SplitStream] = []
        for side in Side:
            found = _split(graph, context, marker, side, index, f"layer {index} {side.name.lower()}")
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
    graph: fx.GraphModule, context: RewriteContext, marker: fx.Node, side: Side, index: int, where: str
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
    lora_b = AttentionConstant(
        name=f"lora_b_{side.name[0].lower()}_{index}",
        modules=path.modules,
        starts=path.starts,
        channels=probe.channels,
        heads=HeadMap(channel_HD) if channel_HD is not None else head_map(probe),
    )
    base = _base_stream(graph, path, transform, channel_HD)
    set_argument(marker, side.value, base)
    if gain_NHD is not None:
        scale_side(graph, marker, side, gain_NHD)
    return SplitStream(base, join_streams(graph, path), lora_b, transform)


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
