"""Writes a graph as JSON, without its weights, and reads it again: equal nodes with equal names, so equal code.

    add = aten.add.Tensor(x, 2)        ["add", "call_function", "aten.add.Tensor", [{"node": "x"}, 2], {}]

A node is a list of name, op, target, arguments and named arguments. Values that JSON lacks are objects of one entry
(`_to_json`). Weights are named; the reader binds them. The body of a higher-order op is a graph in the graph.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lragent.compat.torch import OpOverload
from lragent.errors import InternalError
from lragent.kernels import ops

# The functions other than ops that a graph may call: those of sizes, and one of ours. A file can't name others.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "and_", "or_",
                     "not_", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt", "pow")},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.lstrip("_").startswith("sym_")},
    "lragent.with_slopes": ops.with_slopes,  # its module registers the project's ops
}  # fmt: skip
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_HIGHER_ORDER = "higher_order"  # the namespace of ops that take graphs
_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format)  # their texts are "torch.NAME"


def write_graph(graph: fx.GraphModule, path: Path) -> None:
    """Writes a graph.

    Raises:
        InternalError: a node is of a kind that graphs of the exporter do not have.
        OSError: the file can't be written.
    """
    weights = {
        "parameters": [name for name, _ in graph.named_parameters(remove_duplicate=False)],
        "buffers": [name for name, _ in graph.named_buffers(remove_duplicate=False)],
    }
    path.write_text(json.dumps({**weights, **_described(graph)}), encoding="utf-8")


def read_graph(path: Path, weights: Mapping[str, Tensor]) -> fx.GraphModule:
    """Reads a graph and binds `weights` by name, without a copy. Tied weights stay tied.

    Raises:
        InternalError: it calls something that is no op and not in `_FUNCTIONS`.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    root = _built(stored)
    parameters: dict[int, nn.Parameter] = {}
    for name in stored["parameters"]:
        weight = weights[name]
        if id(weight) not in parameters:
            parameters[id(weight)] = nn.Parameter(weight, requires_grad=False)
        owner, leaf = _owner(root, name)
        owner.register_parameter(leaf, parameters[id(weight)])
    for name in stored["buffers"]:
        owner, leaf = _owner(root, name)
        owner.register_buffer(leaf, weights[name])
    return root


def _described(graph: fx.GraphModule) -> dict[str, Any]:
    """The nodes of a graph, and its subgraphs by the name under which a node reads them."""
    nodes, graphs = [], {}
    for node in graph.graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _name_of(target)
        elif node.op == "get_attr":
            read = attrgetter(target)(graph)
            if isinstance(read, fx.GraphModule):
                graphs[target] = _described(read)
            elif not isinstance(read, Tensor):
                raise InternalError(f"node {node.name} reads a {type(read).__name__}, which can't be stored")
        elif node.op not in ("placeholder", "output"):
            raise InternalError(f"node {node.name} is a {node.op}, which can't be stored")
        named = {name: _to_json(value) for name, value in node.kwargs.items()}
        nodes.append([node.name, node.op, target, [_to_json(value) for value in node.args], named])
    return {"nodes": nodes, "graphs": graphs}


def _built(stored: Mapping[str, Any]) -> fx.GraphModule:
    """The graph of `_described`, without its weights."""
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for target, inner in stored["graphs"].items():
        owner, leaf = _owner(module, target)
        owner.add_module(leaf, _built(inner))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, op, target, args, named in stored["nodes"]:
        nodes[name] = graph.create_node(
            op,
            _function(target) if op == "call_function" else target,
            tuple(_from_json(value, nodes) for value in args),
            {key: _from_json(value, nodes) for key, value in named.items()},
            name,
        )
    module.graph = graph
    return module


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds an attribute, and the attribute's own name; modules that are missing are added."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    return owner, leaf


def _name_of(target: Any) -> str:
    """The name under which `_function` finds a function."""
    if isinstance(target, OpOverload):
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    name = str(getattr(target, "__name__", ""))
    if getattr(torch.ops.higher_order, name, None) is target:
        return f"{_HIGHER_ORDER}.{name}"
    raise InternalError(f"a call of {target} can't be stored")


def _function(name: str) -> Any:
    """A function by its name: "NAMESPACE.OP.OVERLOAD", "higher_order.OP" or one of `_FUNCTIONS`.

    Raises:
        InternalError: there is no such function.
    """
    namespace, _, rest = name.partition(".")
    found = _FUNCTIONS.get(name)
    if found is None and namespace == _HIGHER_ORDER:
        found = getattr(torch.ops.higher_order, rest, None)
    elif found is None:
        held: Any = torch.ops
        for part in name.split("."):
            held = getattr(held, part, None)
        found = held if isinstance(held, OpOverload) else None
    if found is None:
        raise InternalError(f"a stored graph calls {name}, which is no op")
    return found


def _to_json(value: Any) -> Any:
    """An argument of a node as a value of JSON; the object of one entry for a node is {"node": its name}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_to_json(one) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(one) for one in value]}
    if isinstance(value, slice):
        return {"slice": [_to_json(one) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, _OF_TORCH):
        return {"torch": str(value).removeprefix("torch.")}
    raise InternalError(f"an argument of type {type(value).__name__} can't be stored")


def _from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `_to_json`."""
    if isinstance(value, list):
        return [_from_json(one, nodes) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return nodes[held]
    if kind == "device":
        return torch.device(held)
    if kind == "torch":
        return getattr(torch, held)
    items = [_from_json(one, nodes) for one in held]
    return slice(*items) if kind == "slice" else tuple(items)
