"""Finding, reading and adding nodes of FX graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from lragent.errors import InternalError
from lragent.probing.position_offset import POSITIONS


def calls(graph: fx.GraphModule, *targets: object) -> Iterable[fx.Node]:
    """Call nodes with one of the targets, in graph order."""
    return [n for n in graph.graph.nodes if n.op == "call_function" and n.target in targets]


def placeholder(graph: fx.GraphModule, name: str) -> fx.Node | None:
    return next((n for n in graph.graph.nodes if n.op == "placeholder" and n.target == name), None)


def argument(node: fx.Node, name: str) -> Any:
    """The argument of a call of an op by its name in the op's schema; the schema's default if the call has none.

    Raises:
        InternalError: the op has no such argument.
    """
    position, default = _place(_op_of(node), name)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    """Replaces an argument that the call passes by position, found by its name in the op's schema.

    Raises:
        InternalError: the op has no such argument.
    """
    position, _ = _place(_op_of(node), name)
    node.update_arg(position, value)


def in_order(op: OpOverload, **named: object) -> tuple[Any, ...]:
    """All arguments of an op, passed by name, in the order of its schema.

    Raises:
        InternalError: an argument is missing, or the op has no such argument.
    """
    names = [entry.name for entry in op._schema.arguments]
    if named.keys() != set(names):
        raise InternalError(f"{op} takes {', '.join(names)}, not {', '.join(named)}")
    return tuple(named[name] for name in names)


def _op_of(node: fx.Node) -> OpOverload:
    if not isinstance(node.target, OpOverload):
        raise InternalError(f"{node.name} calls no op")
    return node.target


def _place(op: OpOverload, name: str) -> tuple[int, object]:
    """Position and default of an argument."""
    for position, entry in enumerate(op._schema.arguments):
        if entry.name == name:
            return position, entry.default_value
    raise InternalError(f"{op} has no argument {name}")


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user if it has exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def emit(graph: fx.GraphModule, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call of an op at the insertion point."""
    return graph.graph.call_function(target, args, kwargs)


def fetch(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a `get_attr` node."""
    value: object = attrgetter(str(node.target))(graph)
    assert isinstance(value, Tensor)
    return value


def add_constant(graph: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Adds (or reuses, if name and content are there) a buffer and returns a `get_attr` node at the insertion point."""
    held = getattr(graph, name, None)
    if held is None:
        graph.register_buffer(name, tensor.detach().contiguous())
    elif held.dtype != tensor.dtype or not torch.equal(held, tensor):
        raise ValueError(f"constant {name} exists with another content")
    return graph.graph.get_attr(name)


def add_shared_constant(graph: fx.GraphModule, stem: str, tensor: Tensor) -> fx.Node:
    """As `add_constant`, under the first of `stem_0, stem_1, ...` that is free or holds the same content."""
    index = 0
    while True:
        name = f"{stem}_{index}"
        held = getattr(graph, name, None)
        if held is None or (held.dtype == tensor.dtype and torch.equal(held, tensor)):
            return add_constant(graph, name, tensor)
        index += 1


def dependents(graph: fx.Graph, is_source: Callable[[fx.Node], bool], hides: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Sources, and nodes whose values depend on them; a node that `hides` passes nothing on from its inputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_source(node) or (not hides(node) and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def depends_on_ids(graph: fx.Graph, others: Collection[str] = (POSITIONS,)) -> set[fx.Node]:
    """Nodes whose values (not only shapes) depend on token ids.

    Args:
        others: inputs of the graph that are not token ids.
    """
    return dependents(
        graph,
        lambda node: node.op == "placeholder" and node.target not in others,
        lambda node: node.target is torch.ops.aten.sym_size.int,
    )


def evaluate(graph: fx.GraphModule, node: fx.Node, tokens: int, known: dict[fx.Node, Any]) -> Any:
    """Value of a node that needs no token ids, for `tokens` positions 0, 1, 2, ...; `known` values are given."""
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
