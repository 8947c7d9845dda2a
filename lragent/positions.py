"""How a model counts positions: what it adds to 0, 1, 2, ... by itself, and where its graph counts without asking.

Some models start counting later than 0 (a learned table with rows kept free), others have no input for positions and
count rows. Packed tokens of many sequences need every position to come from the input.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx

from lragent.errors import LRAgentError, ModelError, shortened

POSITIONS = "position_ids"
# Offsets that are tried; tables keep a row or two free for padding.
OFFSETS = range(8)
_TOKENS = 8
# Ops that read the shape of a tensor only.
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


def takes_positions(model: Any) -> bool:
    """Returns true if the model's forward declares an input for positions, or takes any keyword."""
    inputs = inspect.signature(model.forward).parameters
    return POSITIONS in inputs or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inputs.values())


def logits_at(model: Any, ids_1T: Tensor, positions_1T: Tensor | None) -> Tensor:
    """Logits `[1, T, vocab]` of one forward without a cache; positions are passed if there is an input for them."""
    at = {POSITIONS: positions_1T} if positions_1T is not None and takes_positions(model) else {}
    logits: Tensor = model(input_ids=ids_1T, use_cache=False, **at).logits
    return logits


def require_logits_at(model: Any, ids_1T: Tensor, positions_1T: Tensor | None) -> Tensor:
    """The same, without gradients.

    Raises:
        ModelError: the model doesn't run.
    """
    try:
        with torch.no_grad():
            return logits_at(model, ids_1T, positions_1T)
    except LRAgentError:
        raise
    except Exception as error:
        inputs = "token ids alone" if positions_1T is None else "token ids and positions"
        raise ModelError(
            f"{type(model).__name__} does not run on {inputs}: {shortened(error)}",
            "Check that the model and its adapters run in transformers and PEFT.",
        ) from error


def position_offset(model: Any, vocab_size: int) -> int:
    """Finds the constant that must be added to positions 0, 1, 2, ... to get the logits that no positions give.

    It is 0 for a model without an input for positions.

    Raises:
        ModelError: the model doesn't run.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(_TOKENS + 1) if i != padding][:_TOKENS]]) % vocab_size
    untold = require_logits_at(model, ids, None)
    for offset in OFFSETS if takes_positions(model) else ():
        if torch.equal(require_logits_at(model, ids, torch.arange(_TOKENS)[None] + offset), untold):
            return offset
    return 0


def ask_for_positions(graph: fx.GraphModule) -> int:
    """Reads positions from the input wherever the graph counts rows itself; returns how many places changed.

    Before:                              After:
        n   = sym_size(input_ids, 1)         row = select(position_ids, 0, 0)      [T]
        row = arange(0, n)     [T]           at  = add(row, 2)                     [T]
        at  = add(row, 2)      [T]           e   = embedding(table, at)
        e   = embedding(table, at)

    A value counts rows if it depends on nothing but the number of tokens and is `0, 1, 2, ...` plus a constant at
    several lengths. Whether the graph then treats every token alike is for the caller to check.
    """
    for check in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.graph.erase_node(check)
    graph.graph.eliminate_dead_code()
    counting = _counting_nodes(graph)
    positions = next(n for n in graph.graph.nodes if n.op == "placeholder" and n.target == POSITIONS)
    for node, first in counting.items():
        with graph.graph.inserting_after(node):
            shape = node.meta["val"].shape
            given = positions if len(shape) == 2 else graph.graph.call_function(torch.select, (positions, 0, 0))
        with graph.graph.inserting_after(node if given is positions else given):
            moved = graph.graph.call_function(torch.add, (given, first))
        node.replace_all_uses_with(moved)
        moved.meta["val"] = node.meta["val"]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return len(counting)


def _counting_nodes(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """Nodes whose value is a row count, and the count of the first row."""
    fixed = _independent_of_values(graph.graph)
    starts: dict[fx.Node, list[int | None]] = {}
    for tokens in (5, 8):
        for node, value in _run(graph, tokens).items():
            if node in fixed:
                starts.setdefault(node, []).append(_count_start(value, tokens))
    return {
        node: found[0]
        for node, found in starts.items()
        if found[0] is not None and all(s == found[0] for s in found) and not _picks_rows(node)
    }


def _picks_rows(node: fx.Node) -> bool:
    """Whether a count is used to index a tensor by row, where only the row itself is right."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_floating_point():
        return False
    return any(user.target in _INDEXING or _picks_rows(user) for user in node.users)


def _count_start(value: Any, tokens: int) -> int | None:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return None
    if value.shape not in ((tokens,), (1, tokens)):
        return None
    flat = value.reshape(-1)
    return int(flat[0]) if torch.equal(flat - flat[0], torch.arange(tokens).to(flat.dtype)) else None


def _independent_of_values(graph: fx.Graph) -> set[fx.Node]:
    """Call nodes that depend on sizes of inputs at most."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        reads = node.target not in _OF_SHAPE and any(n in dependent for n in node.all_input_nodes)
        if reads or node.op in ("placeholder", "get_attr"):
            dependent.add(node)
    return {node for node in graph.nodes if node.op == "call_function" and node not in dependent}


def _run(graph: fx.GraphModule, tokens: int) -> dict[fx.Node, Any]:
    """Values of all nodes for some tokens."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(graph).run(torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None])
    return values
