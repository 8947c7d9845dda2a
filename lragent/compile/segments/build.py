"""Builds a graph per segment. Its inputs are weights, cache tensors, step inputs and values of other segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lragent.compile.segments.cut import Cut
from lragent.compile.segments.plan import INPUT, VALUE, WEIGHT
from lragent.compile.segments.shapes import CannotCut, Form, Scalar, TensorForm
from lragent.program.step import Size

aten = torch.ops.aten


@dataclass(frozen=True)
class GraphSegment:
    """A part of a lowered graph.

    Args:
        graph: takes the inputs in order and returns a tuple; all tensors are contiguous.
        inputs: source of each input, as in `lragent.compile.segments.plan`.
        outputs: names of the values that it returns, with the prefix "value:".
        shapes, dtypes: shape and dtype of each input.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[Size, ...], ...]
    dtypes: tuple[torch.dtype, ...]


def build(graph: fx.GraphModule, cut: Cut, forms: Mapping[fx.Node, Form]) -> tuple[list[GraphSegment], str]:
    """Builds the graphs of all segments.

    Args:
        graph: the lowered graph.
        cut: the segment of each node.
        forms: the form of each node's value (`lragent.compile.segments.shapes.forms`).

    Returns:
        The segments in execution order, and the name of the value that is the graph's result.

    Raises:
        CannotCut: a value that crosses a cut has a size that is neither fixed nor a named size of the step.
    """
    (result,) = graph.graph.output_node().all_input_nodes
    builders = [_Builder(graph, cut, forms, number) for number in range(cut.count)]
    for node, number in cut.segment.items():
        builders[number].compute(node)
    wanted = {result}.union(*(builder.taken for builder in builders))
    return [builder.finish(wanted) for builder in builders if builder.computes], VALUE + result.name


class _Builder:
    """Builds the graph of one segment, node by node, in the order of the whole graph."""

    def __init__(self, whole: fx.GraphModule, cut: Cut, forms: Mapping[fx.Node, Form], number: int) -> None:
        self.taken: set[fx.Node] = set()  # values of other segments that this one reads
        self._whole, self._cut, self._forms, self._number = whole, cut, forms, number
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[str, fx.Node] = {}
        self._inputs: dict[str, tuple[fx.Node, tuple[Size, ...], torch.dtype]] = {}

    @property
    def computes(self) -> bool:
        """True if the segment contains at least one node."""
        return bool(self._made)

    def compute(self, node: fx.Node) -> None:
        self._made[node] = self._copy(node)

    def finish(self, wanted: set[fx.Node]) -> GraphSegment:
        given = [node for node in self._made if node in wanted and self._cut.segment.get(node) == self._number]
        # A value may be a view. The clone is contiguous and aliases nothing; Inductor drops it where it is redundant.
        outputs = tuple(
            self._graph.call_function(
                aten.clone.default, (self._made[node],), {"memory_format": torch.contiguous_format}
            )
            for node in given
        )
        self._graph.output(outputs)
        return GraphSegment(
            fx.GraphModule(torch.nn.Module(), self._graph),
            tuple(self._inputs),
            tuple(VALUE + node.name for node in given),
            tuple(shape for _, shape, _ in self._inputs.values()),
            tuple(dtype for _, _, dtype in self._inputs.values()),
        )

    def _copy(self, node: fx.Node) -> fx.Node:
        needed = {argument: self._use(argument) for argument in node.all_input_nodes}
        return self._graph.node_copy(node, needed.__getitem__)

    def _use(self, node: fx.Node) -> fx.Node | float:
        """Returns the node or number that represents a node of the whole graph in this segment."""
        form = self._forms[node]
        if isinstance(form, Scalar) and form.size is not None:
            return self._size(form.size) if isinstance(form.size, str) else form.size
        if node in self._made:
            return self._made[node]
        if node.op == "placeholder":
            return self._input(INPUT + str(node.target), form)
        if node.op == "get_attr":
            return self._input(WEIGHT + str(node.target), form)
        if isinstance(form, Scalar) or node in self._cut.copied:
            self.compute(node)
            return self._made[node]
        self.taken.add(node)
        return self._input(VALUE + node.name, form)

    def _input(self, source: str, form: Form) -> fx.Node:
        if source not in self._inputs:
            if not isinstance(form, TensorForm) or None in form.shape:
                raise CannotCut(f"a value whose size is neither fixed nor a named size crosses a cut ({source})")
            last = next(reversed(self._inputs.values()), (None,))[0]
            place = self._graph.inserting_before(None) if last is None else self._graph.inserting_after(last)
            with place:
                node = self._graph.placeholder(f"in_{len(self._inputs)}")
            shape = tuple(size for size in form.shape if size is not None)
            self._inputs[source] = (node, shape, form.dtype)
        return self._inputs[source][0]

    def _size(self, name: str) -> fx.Node:
        """Returns a node that reads a named size from the first input of the whole graph that has it."""
        if name not in self._sizes:
            for node in self._whole.graph.find_nodes(op="placeholder"):
                form = self._forms[node]
                if isinstance(form, TensorForm) and name in form.shape:
                    held = self._input(INPUT + str(node.target), form)
                    self._sizes[name] = self._graph.call_function(aten.sym_size.int, (held, form.shape.index(name)))
                    break
        return self._sizes[name]
