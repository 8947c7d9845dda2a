"""Lowers a rewritten graph in split layout to a differentiable graph over rows, cut into layers.

Before:                                              After:
    token_ids, positions, agent_ids, ...                 token_ids, positions, agent_ids, logits_rows, rows
    write_kv(k, v, k_base_0, v_base_0, base_slots)
    write_lr(lr, lr_0, lr_table_0, lr_slots)
    o = flash_lora_attention(q, k_base_0, ...)           o = rows_attention(q, k, v, lr, ...)

Nothing is cached: attention takes the values that the rewritten graph would write. A cut follows each attention op, so
that a layer can be recomputed in the backward pass; the last cut stands before the LM head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from lragent.errors import InternalError
from lragent.graph.fx_tools import argument, calls, placeholder
from lragent.kernels import ops
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import STEP_INPUTS, cache_input_names, input_sizes
from lragent.training.attention import KeyRule, LowRank, rows_attention
from lragent.training.rows import Rows

aten = torch.ops.aten

ROW_INPUTS = ("token_ids", "positions", "agent_ids", "logits_rows")
ROWS = "rows"  # the graph's input of type `RowsInput`


@dataclass(frozen=True)
class LayerStreams:
    """Streams of one attention op, in the order of the rows.

    Args:
        layer: number of the attention op, in graph order.
        key_NHDk, value_NHDv: base streams; K as it would be cached (`KeyRule.key_is_final`).
        low_rank_k, low_rank_v: LR streams and B; None without adapter.
    """

    layer: int
    key_NHDk: Tensor
    value_NHDv: Tensor
    low_rank_k: LowRank | None
    low_rank_v: LowRank | None


Observer = Callable[[LayerStreams], None]


@dataclass(frozen=True)
class RowsInput:
    """The rows of a forward.

    Args:
        observe: called with the streams of each attention op.
        before: by attention op, streams of rows that ran before these. Reads count those rows first.
    """

    rows: Rows
    observe: Observer | None = None
    before: tuple[LayerStreams, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A part of the graph.

    Args:
        call: takes the values named by `takes`, in order; returns those named by `gives`, in order.
        takes, gives: names of graph inputs and of values that cross cuts.
    """

    call: fx.GraphModule
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class RowGraph:
    """A graph over rows.

    Args:
        layers: in order, from the embedding to the last hidden states.
        head: takes hidden states of wanted rows; gives logits `[R, vocab]`.
        hidden: name of the hidden states of the wanted rows, `[1, R, D]`, which the last layer gives.
        inputs: names of constants that are passed as inputs instead of being read from the graph.
        holds_scores: True if some attention keeps its scores `[heads, n, L]` in memory: one with sinks or a soft cap,
            or with keys of another size than values, which PyTorch's fused kernels for the CPU don't take.
    """

    layers: tuple[Segment, ...]
    head: Segment
    hidden: str
    inputs: tuple[str, ...]
    holds_scores: bool


def lower_to_rows(graph: fx.GraphModule, schema: CacheSchema, inputs: tuple[str, ...]) -> RowGraph:
    """Lowers a rewritten graph; it is changed, its tensors are shared.

    Args:
        graph: takes the inputs of `lragent.program.step`; not lowered to an attention implementation.
        inputs: names of constants that become inputs, so that gradients reach them.
    """
    capped = any(
        argument(node, "sinks_Hq") is not None or argument(node, "softcap")
        for node in calls(graph, ops.flash_lora_attention)
    )
    _attach_rows(graph, schema)
    for name in inputs:
        _make_input(graph, name)
    for node in graph.graph.find_nodes(op="call_function", target=aten.copy.default):
        node.target = copied  # it has no derivative
    graph.graph.eliminate_dead_code()
    selected = _selected(graph)
    segments = tuple(_segment(graph, part) for part in _parts(graph, selected))
    unequal = any(layer.k_dim != layer.v_dim for layer in schema.base)
    return RowGraph(segments[:-1], segments[-1], selected.name, inputs, capped or unequal)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low_rank_k: tuple[Tensor, Tensor, list[int], list[int]] | None,
    low_rank_v: tuple[Tensor, Tensor, list[int], list[int]] | None,
    rule: tuple[Any, ...],
    layer: int,
    given: RowsInput,
) -> Tensor:
    """`rows_attention` as graph nodes call it: the fields of `LowRank` and `KeyRule` in order."""
    k, v = (None if low_rank is None else LowRank(*low_rank) for low_rank in (low_rank_k, low_rank_v))
    streams = LayerStreams(layer, key, value, k, v)
    if given.observe is not None:
        given.observe(streams)
    if given.before:
        streams = _behind(given.before[layer], streams)
    k, v = streams.low_rank_k, streams.low_rank_v
    return rows_attention(query, streams.key_NHDk, streams.value_NHDv, k, v, KeyRule(*rule), given.rows)


def copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten.copy` with a derivative: the source in shape and dtype of another tensor."""
    return source.to(into.dtype).expand_as(into)


def _behind(before: LayerStreams, streams: LayerStreams) -> LayerStreams:
    """Streams of an attention op, of the rows before and these."""

    def low_rank(first: LowRank | None, then: LowRank | None) -> LowRank | None:
        if first is None or then is None:
            return then
        return replace(then, lr_NR=torch.cat((first.lr_NR, then.lr_NR)))

    return LayerStreams(
        streams.layer,
        torch.cat((before.key_NHDk, streams.key_NHDk)),
        torch.cat((before.value_NHDv, streams.value_NHDv)),
        low_rank(before.low_rank_k, streams.low_rank_k),
        low_rank(before.low_rank_v, streams.low_rank_v),
    )


def _attach_rows(graph: fx.GraphModule, schema: CacheSchema) -> None:
    """Replaces cache writes and attention over the cache, and the step's inputs by those of rows."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = dict(zip(inputs, (*STEP_INPUTS, *cache_input_names(schema)), strict=True))
    with graph.graph.inserting_after(inputs[-1]):
        rows = graph.graph.placeholder(ROWS)
    written: dict[fx.Node, fx.Node] = {}  # cache input -> the value written into it
    for node in calls(graph, ops.write_kv):
        written[argument(node, "k_cache")] = argument(node, "key_THDk")
        written[argument(node, "v_cache")] = argument(node, "value_THDv")
    for node in calls(graph, ops.write_lr):
        written[argument(node, "lr_cache")] = argument(node, "lr_TR")
    streams = {f"lr_{number}": stream for number, stream in enumerate(schema.low_rank)}

    def side(call: fx.Node, name: str) -> tuple[object, ...] | None:
        cache = argument(call, f"lr_{name}")
        if cache is None:
            return None
        stream = streams[names[cache]]
        return written[cache], argument(call, f"b_{name}"), [*stream.ranks], [*stream.source_columns()]

    for layer, node in enumerate(calls(graph, ops.flash_lora_attention)):
        arguments: tuple[Any, ...] = (
            argument(node, "query_THqDk"),
            written[argument(node, "k_cache")],
            written[argument(node, "v_cache")],
            side(node, "k"),
            side(node, "v"),
            tuple(argument(node, field.name) for field in fields(KeyRule)),
            layer,
            rows,
        )
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(attend, arguments)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    for node in calls(graph, ops.write_kv, ops.write_lr):
        graph.graph.erase_node(node)
    _count_kept_tokens(graph, schema, names)
    for node, name in names.items():
        if name in ROW_INPUTS:
            node.target = name
        else:
            graph.graph.erase_node(node)


def _count_kept_tokens(graph: fx.GraphModule, schema: CacheSchema, names: dict[fx.Node, str]) -> None:
    """Takes the number of tokens from `token_ids`, which stays; an exported graph may take it from another input."""
    sizes = input_sizes(schema)
    token_ids = next(node for node, name in names.items() if name == "token_ids")
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is aten.sym_size.int and node.args[0] in names:
            source, dim = node.args
            if source is not token_ids and sizes[names[source]][dim] == "tokens":
                node.args = (token_ids, 0)


def _make_input(graph: fx.GraphModule, name: str) -> None:
    """Replaces the reads of a constant by an input of the same name."""
    reads = [node for node in graph.graph.nodes if node.op == "get_attr" and node.target == name]
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        given = graph.graph.placeholder(name)
    for node in reads:
        node.replace_all_uses_with(given)
        graph.graph.erase_node(node)


def _selected(graph: fx.GraphModule) -> fx.Node:
    """The op that selects the wanted rows of the last hidden states (`passes/select_logits.py`)."""
    wanted = placeholder(graph, "logits_rows")
    found = [
        node
        for node in graph.graph.nodes
        if node.target is aten.index_select.default and node.args[2] is wanted and node.args[1] == 1
    ]
    if len(found) != 1:
        raise InternalError(f"the graph selects the wanted rows in {len(found)} places")
    selected: fx.Node = found[0]
    return selected


def _parts(graph: fx.GraphModule, selected: fx.Node) -> list[list[fx.Node]]:
    """Computing nodes in order: one part that ends with each attention op, the rest up to `selected`, the head."""
    parts: list[list[fx.Node]] = [[]]
    for node in graph.graph.nodes:
        if node.op == "call_function":
            parts[-1].append(node)
            if node.target is attend or node is selected:
                parts.append([])
    return parts


def _segment(graph: fx.GraphModule, part: list[fx.Node]) -> Segment:
    """A callable of a part. Constants are read from `graph`, everything else that it needs is an argument."""
    inside = set(part)
    used = dict.fromkeys(n for node in part for n in node.all_input_nodes if n not in inside)
    takes = [node for node in used if node.op != "get_attr"]
    gives = [node for node in part if any(user not in inside for user in node.users)]
    cut = fx.Graph()
    copied = {node: cut.placeholder(node.name) for node in takes}
    copied |= {node: cut.get_attr(str(node.target)) for node in used if node.op == "get_attr"}
    for node in part:
        copied[node] = cut.node_copy(node, lambda n: copied[n])
    cut.output(tuple(copied[node] for node in gives))
    names = tuple(str(node.target) if node.op == "placeholder" else node.name for node in takes)
    return Segment(fx.GraphModule(graph, cut), names, tuple(node.name for node in gives))
