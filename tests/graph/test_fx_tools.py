"""fx_tools: arguments of ops are found by their names in the schema."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from lragent.errors import InternalError
from lragent.graph.fx_tools import argument, in_order, set_argument

LINEAR = torch.ops.aten.linear.default


def _linear(*arguments: str, **named: str) -> fx.Node:
    """A call of `linear(input, weight, bias=None)` on placeholders."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in (*arguments, *named.values())}
    return graph.call_function(LINEAR, tuple(nodes[n] for n in arguments), {n: nodes[v] for n, v in named.items()})


def test_an_argument_by_place_by_name_and_by_default() -> None:
    assert [argument(_linear("x", "w", "b"), name).name for name in ("input", "weight", "bias")] == ["x", "w", "b"]
    assert argument(_linear("x", "w", bias="c"), "bias").name == "c"
    assert argument(_linear("x", "w"), "bias") is None


def test_an_argument_is_replaced() -> None:
    node = _linear("x", "w", "b")
    set_argument(node, "weight", node.args[0])  # type: ignore[arg-type]
    assert [n.name for n in node.all_input_nodes] == ["x", "b"] and node.args[1] is node.args[0]


def test_arguments_are_put_in_order() -> None:
    assert in_order(LINEAR, bias=3, input=1, weight=2) == (1, 2, 3)


@pytest.mark.parametrize("named", [{"input": 1, "weight": 2}, {"input": 1, "weight": 2, "bias": 3, "scale": 4}])
def test_missing_and_unknown_arguments_are_refused(named: dict[str, int]) -> None:
    with pytest.raises(InternalError, match="takes input, weight, bias, not input, weight"):
        in_order(LINEAR, **named)


def test_an_unknown_name_and_a_node_that_calls_no_op_are_refused() -> None:
    node = _linear("x", "w")
    with pytest.raises(InternalError, match="no argument scale"):
        argument(node, "scale")
    with pytest.raises(InternalError, match="x calls no op"):
        argument(node.args[0], "input")  # type: ignore[arg-type]
