"""Finds, reads and adds nodes of FX graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lragent.compat.torch import OpOverload, arguments_of
from lragent.errors import InternalError
from lragent.probing.position_offset import POSITIONS


def calls(graph: fx.GraphModule, *targets: object) -> Iterable[fx.Node]:
    """Call nodes with one of the targets, in graph order."""
    return [n for n in graph.graph.nodes if n.op == "call_function" and n.target in targets]


def placeholder(graph: fx.GraphModule, name: str) -> fx.Node | None:
    return next((n for n in graph.graph.nodes if n.op == "placeholder" and n.target == name), None)


def argument(node: fx.Node, name: str) -> Any:
    """Reads an argument of an op call by its schema name; the schema's default if the call does not pass it.

    Raises:
        InternalError: the op has no such argument.
    """
    position, default = _place(_op_of(node), name)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    """Replaces a positional argument of an op call; `name` is its schema name.

    Raises:
        InternalError: the op has no such argument.
    """
    position, _ = _place(_op_of(node), name)
    node.update_arg(position, value)


def in_order(op: OpOverload, **named: object) -> tuple[Any, ...]:
    """Sorts all arguments of an op, passed by name, into the order of its schema.

    Raises:
        InternalError: an argument is missing, or the op has no such argument.
    """
    names = [entry.name for entry in arguments_of(op)]
    if named.keys() != set(names):
        raise InternalError(f"{op} takes {', '.join(names)}, not {', '.join(named)}")
    return tuple(named[name] for name in names)


def _op_of(node: fx.Node) -> OpOverload:
    if not isinstance(node.target, OpOverload):
        raise InternalError(f"{node.name} calls no op")
    return node.target


def _place(op: OpOverload, name: str) -> tuple[int, object]:
    """Position and default of an argument."""
    for position, entry in enumerate(arguments_of(op)):
        if entry.name == name:
            return position, entry.default
    raise InternalError(f"{op} has no argument {name}")


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node; None if it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def emit(graph: fx.GraphModule, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call of an op at the insertion point."""
    return graph.graph.call_function(target, args, kwargs)


def drop_metadata_asserts(graph: fx.GraphModule) -> None:
    """Erases the exporter's checks of dtypes and devices, which would count as users of the values that they check."""
    for check in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.graph.erase_node(check)


def fetch(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a `get_attr` node reads."""
    value: object = attrgetter(str(node.target))(graph)
    assert isinstance(value, Tensor)
    return value


def add_constant(graph: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Adds a buffer, or reuses an equal one of this name; returns a `get_attr` node at the insertion point.

    Raises:
        ValueError: the graph has a buffer of this name with another content.
    """
    existing = getattr(graph, name, None)
    if existing is None:
        graph.register_buffer(name, tensor.detach().contiguous())
    elif existing.dtype != tensor.dtype or not torch.equal(existing, tensor):
        raise ValueError(f"constant {name} exists with another content")
    return graph.graph.get_attr(name)


def add_shared_constant(graph: fx.GraphModule, stem: str, tensor: Tensor) -> fx.Node:
    """Like `add_constant`; the name is the first of `stem_0, stem_1, ...` that is unused or has the same content."""
    index = 0
    while True:
        name = f"{stem}_{index}"
        existing = getattr(graph, name, None)
        if existing is None or (existing.dtype == tensor.dtype and torch.equal(existing, tensor)):
            return add_constant(graph, name, tensor)
        index += 1


def dependents(graph: fx.Graph, is_source: Callable[[fx.Node], bool], hides: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Sources and all nodes whose values depend on them; dependence stops at nodes for which `hides` is true."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_source(node) or (not hides(node) and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def depends_on_ids(graph: fx.Graph, others: Collection[str] = (POSITIONS,)) -> set[fx.Node]:
    """Nodes whose values, not only shapes, depend on token ids.

    Args:
        others: names of the graph inputs that are not token ids.
    """
    return dependents(
        graph,
        lambda node: node.op == "placeholder" and node.target not in others,
        lambda node: node.target is torch.ops.aten.sym_size.int,
    )


def evaluate(graph: fx.GraphModule, node: fx.Node, tokens: int, known: dict[fx.Node, Any]) -> Any:
    """Computes a node that does not depend on token ids, for positions 0 to `tokens - 1`.

    Args:
        known: values of nodes that are already computed; new values are added.
    """
    if node in known:
        return known[node]
    if node.op == "placeholder":
        return torch.arange(tokens)[None] if node.target == POSITIONS else torch.zeros(1, tokens, dtype=torch.int64)
    if node.op == "get_attr":
        value: Any = attrgetter(str(node.target))(graph)
    elif node.target is torch.ops.aten.sym_size.int:
        size = node.meta["val"]
        value = int(size) if isinstance(size, int) else tokens
    else:
        assert callable(node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: evaluate(graph, n, tokens, known))
        with torch.no_grad():
            value = node.target(*args, **kwargs)
    known[node] = value
    return value
