"""Per-agent replacement of weight rows (modules_to_save, trainable tokens).

For an embedding, `x` holds token ids:           For a linear module:
    at  = flat[agent_ids * V + x]   [1, T]           new  = linear(x, rows)                    [1, T, K + 1]
    new = embedding(rows, at)       [1, T, out]      at   = table[agent_ids]                   [T, out]
    y   = where(at > 0, new, y)                      y    = where(at > 0, gather(new, at), y)  [1, T, out]

`rows` `[K + 1, ...]` holds a row of zeros, then the rows of all agents. `table` `[N + 1, V or out]` gives, by agent id,
the index of the row that replaces an output, 0 for none; its row 0 is base.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from lragent.graph.fx_tools import add_constant, emit
from lragent.loading.adapter_weights import ReplacedRows

aten = torch.ops.aten


def replace_rows(
    graph: fx.GraphModule,
    name: str,
    agents: tuple[str, ...],
    rows: Mapping[str, ReplacedRows],
    x: fx.Node,
    y: fx.Node,
    ids: fx.Node,
    width: int,
    embeds: bool,
) -> fx.Node:
    """Adds the computation above at the insertion point and returns the new y.

    Args:
        ids: agent ids of the tokens in x, `[T]`.
        width: outputs of the module; tokens, if it is an embedding (`embeds`).
    """
    call = partial(emit, graph)

    weight, bias, table = _tables(agents, rows, width)
    table_node = add_constant(graph, f"{name}_table", table.reshape(-1) if embeds else table)
    weight_node = add_constant(graph, f"{name}_weight", weight)
    if embeds:
        flat = call(aten.add.Tensor, call(aten.mul.Tensor, call(aten.unsqueeze.default, ids, 0), width), x)
        at = call(aten.index.Tensor, table_node, [flat])
        new = call(aten.embedding.default, weight_node, at)
        at = call(aten.unsqueeze.default, at, 2)
    else:
        with_bias = () if bias is None else (add_constant(graph, f"{name}_bias", bias),)
        every = call(aten.linear.default, x, weight_node, *with_bias)
        at = call(aten.unsqueeze.default, call(aten.index_select.default, table_node, 0, ids), 0)
        new = call(aten.gather.default, every, 2, at)
    return call(aten.where.self, call(aten.gt.Scalar, at, 0), new, y)


def _tables(
    agents: tuple[str, ...], rows: Mapping[str, ReplacedRows], width: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All agents' rows `[K + 1, in]`, their biases `[K + 1]` (None: there are none), indices `[N + 1, width]`."""
    some = next(iter(rows.values()))
    table = torch.zeros(len(agents) + 1, width, dtype=torch.int64)
    weights = [some.weight.new_zeros(1, some.weight.shape[1])]
    biases = [some.weight.new_zeros(1)]
    at = 1
    for agent, name in enumerate(agents, 1):
        own = rows.get(name)
        if own is None:
            continue
        count = len(own.index)
        table[agent, own.index] = torch.arange(at, at + count)
        weights.append(own.weight)
        biases.append(own.weight.new_zeros(count) if own.bias is None else own.bias)
        at += count
    biased = any(own.bias is not None for own in rows.values())
    return torch.cat(weights), torch.cat(biases) if biased else None, table
