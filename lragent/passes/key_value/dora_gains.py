"""DoRA magnitudes on K and V in split layout: applied to queries and outputs of attention, not to the cache.

The key of a DoRA agent is `f(g * (base + lr B))` with one factor g per channel. If `f(g * x) = g' * f(x)`, the cached
streams are those of plain LoRA, and

    q . (g' * k) = (q * g') . k                     the query is multiplied by the acting agent's g'
    sum_j p_j (g' * v_j) = g' * sum_j p_j v_j       the output likewise

This holds for values, for keys without rotation, and for rotated pairs of channels with equal factors. It is checked
numerically on f. A norm, or a rotation of channels with different factors, is refused.

Before:                              After:
    attention(q, k, v)                   attention(q * g_k[agent_ids], k, v) * g_v[agent_ids]
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from lragent.graph.attention_marker import QUERY
from lragent.graph.fx_tools import add_shared_constant, argument, emit, placeholder, set_argument
from lragent.passes.contract import Side
from lragent.passes.key_value.key_transform import Probe, Underivable

aten = torch.ops.aten


def per_head(probe: Probe, gain_NC: Tensor | None) -> Tensor | None:
    """g' of every agent, `[N + 1, H, D]`; None if there is no gain.

    Raises:
        Underivable: `f(g * x)` is not `g' * f(x)`.
    """
    if gain_NC is None:
        return None
    ones_1HD = probe(gain_NC.new_ones(1, gain_NC.shape[1]), 0)
    if bool((ones_1HD == 0).any()):
        raise Underivable("it is a DoRA, and some channels are zero for an input of ones")
    gain_NHD = probe(gain_NC, 0) / ones_1HD
    x, positions = probe.random(16, seed=8)
    plain = probe(x, positions)
    for gain_C, gain_HD in zip(gain_NC, gain_NHD, strict=True):
        if not probe.same(gain_HD * plain, probe(gain_C * x, positions)):
            raise Underivable(
                "it is a DoRA, whose magnitudes differ between channels that are rotated or normed together"
            )
    return gain_NHD.to(gain_NC.dtype)


def scale_side(graph: fx.GraphModule, marker: fx.Node, side: Side, gain_NHD: Tensor) -> None:
    """Multiplies the query (side K) or the output (side V) of an attention op by the gain of each token's agent."""
    query = argument(marker, QUERY)
    assert isinstance(query, fx.Node)
    heads = int(query.meta["val"].shape[1])
    table = gain_NHD.repeat_interleave(heads // gain_NHD.shape[1], dim=1)
    ids = placeholder(graph, "agent_ids")
    call = partial(emit, graph)

    def gain_of_tokens() -> fx.Node:
        return call(aten.index_select.default, add_shared_constant(graph, "lora_magnitude", table), 0, ids)

    if side is Side.KEY:
        with graph.graph.inserting_before(marker):
            gain = call(aten.unsqueeze.default, call(aten.transpose.int, gain_of_tokens(), 0, 1), 0)
            scaled = call(aten.mul.Tensor, query, gain)
        scaled.meta["val"] = query.meta["val"]
        set_argument(marker, QUERY, scaled)
        return
    with graph.graph.inserting_after(marker):
        end = emit(graph, aten.mul.Tensor, marker, marker)
    with graph.graph.inserting_before(end):
        gain = call(aten.unsqueeze.default, gain_of_tokens(), 0)
    marker.replace_all_uses_with(end)
    end.args = (marker, gain)
    end.meta["val"] = marker.meta["val"]
