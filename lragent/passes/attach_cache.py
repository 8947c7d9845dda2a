"""Replaces attention over packed tokens by cache writes and attention over the cache; adds the step inputs.

Before:                                              After:
    input_ids, position_ids  [1, T]                      token_ids, positions, agent_ids, ...   (STEP_INPUTS)
                                                         k_base_0, v_base_0, lr_0, lr_table_0   (cache tensors)
    o = attention_marker(q, k, v, sinks, ...)            write_kv(k, v, k_base_0, v_base_0, base_slots)
        [1, T, Hq, D]                                    write_lr(lr, lr_0, lr_table_0, lr_slots)
                                                         o = flash_lora_attention(q, k_base_0, ...)  [T, Hq, D]

A fused projection of K and V has one LR stream. ALiBi slopes become two additional channels of query and key.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from lragent.graph.attention_marker import KEY, QUERY, VALUE, has_slopes, marker_nodes
from lragent.graph.fx_tools import add_constant, add_shared_constant, argument, emit, in_order, placeholder
from lragent.graph.passes import Pass, PassReport
from lragent.kernels import ops
from lragent.passes.adapters.constants import attention_b
from lragent.passes.contract import RewriteContext, RoutedLinear, SplitStream
from lragent.program.cache_schema import BaseStreams, CacheSchema, LowRankStream
from lragent.program.step import STEP_INPUTS, cache_input_names

aten = torch.ops.aten

# Captured placeholders, `[1, T]` -> step inputs, `[T]`.
_RENAMED = {"input_ids": "token_ids", "position_ids": "positions"}


def _run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    markers, state = marker_nodes(graph), context.state
    if not markers:
        return PassReport(0)
    sides = [state.split.get(m.name, _whole(m)) for m in markers]
    streams: dict[fx.Node, int] = {}
    low_rank: list[LowRankStream] = []
    for side in (s for pair in sides for s in pair if s.routed is not None):
        assert side.routed is not None and side.routed.low_rank is not None
        if side.routed.low_rank not in streams:
            streams[side.routed.low_rank] = len(low_rank)
            low_rank.append(side.routed.stream)
    state.base_streams = tuple(_base_streams(i, m) for i, m in enumerate(markers))
    state.low_rank_streams = tuple(low_rank)
    schema = CacheSchema(context.layout, context.agents, state.base_streams, state.low_rank_streams)
    inputs = _add_inputs(graph, schema)
    written: set[int] = set()
    for index, (marker, pair) in enumerate(zip(markers, sides, strict=True)):
        _rewrite(graph, context, inputs, index, marker, pair, streams, written)
    return PassReport(len(markers))


def _whole(marker: fx.Node) -> tuple[SplitStream, SplitStream]:
    key, value = argument(marker, KEY), argument(marker, VALUE)
    assert isinstance(key, fx.Node) and isinstance(value, fx.Node)
    return SplitStream(key), SplitStream(value)


def _base_streams(index: int, marker: fx.Node) -> BaseStreams:
    key, value = argument(marker, KEY), argument(marker, VALUE)
    assert isinstance(key, fx.Node) and isinstance(value, fx.Node)
    k_shape, v_shape = key.meta["val"].shape, value.meta["val"].shape
    more = ops.SLOPE_CHANNELS if has_slopes(marker) else 0
    return BaseStreams(index, int(k_shape[1]), int(k_shape[3]) + more, int(v_shape[3]))


def _add_inputs(graph: fx.GraphModule, schema: CacheSchema) -> dict[str, fx.Node]:
    """Adds placeholders of all step and cache inputs in order, and replaces the captured placeholders."""
    inputs: dict[str, fx.Node] = {}
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        for name in (*STEP_INPUTS, *cache_input_names(schema)):
            inputs[name] = graph.graph.create_node("placeholder", name, name=f"{name}_in")
        for old_name, name in _RENAMED.items():
            packed = emit(graph, aten.unsqueeze.default, inputs[name], 0)
            old = placeholder(graph, old_name)
            assert old is not None
            old.replace_all_uses_with(packed)
            graph.graph.erase_node(old)
    for old in [n for n in graph.graph.nodes if n.op == "placeholder" and n not in inputs.values()]:
        old.replace_all_uses_with(inputs[str(old.target)])
        graph.graph.erase_node(old)
    return inputs


def _rewrite(
    graph: fx.GraphModule,
    context: RewriteContext,
    inputs: dict[str, fx.Node],
    index: int,
    marker: fx.Node,
    pair: tuple[SplitStream, SplitStream],
    streams: dict[fx.Node, int],
    written: set[int],
) -> None:
    query, slopes, scale = (argument(marker, name) for name in (QUERY, "slopes_Hq", "scale"))
    key, value = pair
    with graph.graph.inserting_before(marker):
        call = partial(emit, graph)

        def tokens_first(heads_first: object) -> fx.Node:
            return call(aten.transpose.int, call(aten.squeeze.dim, heads_first, 0), 0, 1)

        k_cache, v_cache = inputs[f"k_base_{index}"], inputs[f"v_base_{index}"]
        base_key: object = key.base
        if slopes is not None:
            both = call(ops.with_slopes, query, base_key, slopes, inputs["positions"], scale)
            query, base_key = (call(operator.getitem, both, part) for part in (0, 1))
        call(
            ops.write_kv,
            tokens_first(base_key),
            tokens_first(value.base),
            k_cache,
            v_cache,
            inputs["base_slots"],
        )
        low_rank: dict[str, object] = {}
        for name, side in (("k", key), ("v", value)):
            if side.routed is None or side.routed.low_rank is None or side.lora_b is None:
                low_rank |= {f"lr_{name}": None, f"lr_{name}_table": None, f"b_{name}": None}
                continue
            number = streams[side.routed.low_rank]
            cache, table = inputs[f"lr_{number}"], inputs[f"lr_table_{number}"]
            if number not in written:
                _write_low_rank(graph, side.routed, cache, table, inputs["lr_slots"])
                written.add(number)
            constant = side.lora_b
            if name == "k" and slopes is not None:
                constant = replace(constant, padding=ops.SLOPE_CHANNELS)
            context.state.lora_b.append(constant)
            lora_b = add_constant(graph, constant.name, attention_b(constant, context.agents, context.adapters))
            low_rank |= {f"lr_{name}": cache, f"lr_{name}_table": table, f"b_{name}": lora_b}
        arguments = in_order(
            ops.flash_lora_attention,
            query_THqDk=tokens_first(query),
            k_cache=k_cache,
            v_cache=v_cache,
            agent_ids_T=inputs["agent_ids"],
            seq_starts=inputs["seq_starts"],
            context_lens_S=inputs["context_lens"],
            page_table_SM=inputs["page_table"],
            **low_rank,
            **_transform_arguments(graph, key),
            **{name: argument(marker, name) for name in ("sinks_Hq", "scale", "window", "softcap")},
        )
        out = call(ops.flash_lora_attention, *arguments)
        packed = call(aten.unsqueeze.default, out, 0)
    marker.replace_all_uses_with(packed)
    graph.graph.erase_node(marker)


def _write_low_rank(
    graph: fx.GraphModule, routed: RoutedLinear, cache: fx.Node, table: fx.Node, slots: fx.Node
) -> None:
    flat = emit(graph, aten.squeeze.dim, routed.low_rank, 0)
    emit(graph, ops.write_lr, flat, cache, table, slots)


def _transform_arguments(graph: fx.GraphModule, key: SplitStream) -> dict[str, object]:
    """Arguments of the attention op that describe the key transform."""
    transform = key.transform
    if transform is None:
        names = ("rope_cos", "rope_sin", "rope_partner", "norm_weight")
        return {**dict.fromkeys(names), "norm_eps": 0.0, "key_is_final": True}
    tables = (
        ("rope_cos", "rope_cos", transform.cos_PD),
        ("rope_sin", "rope_sin", transform.sin_PD),
        ("rope_partner", "rope_partner", transform.partner_D),
        ("norm_weight", "key_norm", transform.norm_weight_D),
    )
    nodes = {name: None if t is None else add_shared_constant(graph, stem, t) for name, stem, t in tables}
    return {**nodes, "norm_eps": transform.norm_eps, "key_is_final": transform.final}


ATTACH_CACHE = Pass("attach_cache", _run)
