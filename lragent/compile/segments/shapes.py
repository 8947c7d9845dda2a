"""Infers the shape of every value of a lowered graph, with names for the sizes that depend on the step.

The graph runs twice on fake tensors, with different values for the named sizes. A size that is equal in both runs is
fixed. A size that equals the same named size in both runs is that named size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lragent.compat.torch import SHAPE_DEPENDS_ON_VALUES, as_fake, fake_mode
from lragent.compile.export import value_of
from lragent.program.step import Size

# Values of the named sizes in the two runs; primes, so that products and sums are not mistaken for a named size.
_RUNS: tuple[Mapping[str, int], ...] = (
    {"tokens": 101, "seqs": 37, "pages_per_seq": 17, "rows": 53, "pages": 1009, "elements": 100_003},
    {"tokens": 211, "seqs": 41, "pages_per_seq": 19, "rows": 59, "pages": 1013, "elements": 100_019},
)


class CannotCut(Exception):
    """A graph that can't be compiled in segments; the message gives the reason."""


@dataclass(frozen=True)
class TensorForm:
    """dtype and shape of a tensor value. A size that is neither fixed nor named is None."""

    dtype: torch.dtype
    shape: tuple[Size | None, ...]


@dataclass(frozen=True)
class Scalar:
    """A Python number in the graph: its value, the name of the size that it equals, or None if it depends on sizes."""

    size: float | str | None


Form = TensorForm | Scalar | None  # None: neither a tensor nor a number, such as a tuple


def forms(graph: fx.GraphModule, inputs: Mapping[str, tuple[tuple[Size, ...], torch.dtype]]) -> dict[fx.Node, Form]:
    """Returns the form of every node's value.

    Args:
        inputs: shape and dtype of every graph input, by name.

    Raises:
        CannotCut: the graph has subgraphs, or a shape depends on the values of a tensor.
    """
    first, second = (_run(graph, inputs, sizes) for sizes in _RUNS)
    names = {name for shape, _ in inputs.values() for name in shape if isinstance(name, str)}
    named = {tuple(value_of(name, sizes) for sizes in _RUNS): name for name in names}
    return {node: _form(first[node], second[node], named) for node in first}


def _run(
    graph: fx.GraphModule, inputs: Mapping[str, tuple[tuple[Size, ...], torch.dtype]], sizes: Mapping[str, int]
) -> dict[fx.Node, Any]:
    mode = fake_mode()
    found: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                shape, dtype = inputs[str(node.target)]
                found[node] = torch.empty([value_of(size, sizes) for size in shape], dtype=dtype)
            elif node.op == "get_attr":
                held = attrgetter(str(node.target))(graph)
                if not isinstance(held, Tensor):
                    raise CannotCut(f"the graph has a subgraph ({node.target})")
                found[node] = as_fake(mode, held)
            elif node.op == "call_function":
                args = fx.map_arg(node.args, found.__getitem__)
                kwargs = fx.map_arg(node.kwargs, found.__getitem__)
                try:
                    found[node] = node.target(*args, **kwargs)
                except SHAPE_DEPENDS_ON_VALUES as error:
                    raise CannotCut(f"a shape depends on the values of a tensor ({node.name})") from error
            elif node.op != "output":
                raise CannotCut(f"the graph has a subgraph ({node.target})")
    return found


def _form(first: Any, second: Any, named: Mapping[tuple[int, ...], str]) -> Form:
    if isinstance(first, Tensor):
        shape = tuple(a if a == b else named.get((a, b)) for a, b in zip(first.shape, second.shape, strict=True))
        return TensorForm(first.dtype, shape)
    if isinstance(first, (bool, int, float)):
        return Scalar(first if first == second else named.get((first, second)))  # type: ignore[arg-type]
    return None
