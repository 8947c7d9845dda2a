"""An exported program as a bare `GraphModule`: positional inputs, one output, no input checks of the exporter."""

from __future__ import annotations

import torch
from torch import fx


def plain_graph(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The unlifted graph: weights are `get_attr` nodes that name parameters of the returned module."""
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    graph = fx.GraphModule(exported, exported.graph)
    output = graph.graph.output_node()
    if isinstance(output.args[0], (tuple, list)):
        output.args = (output.args[0][0],)
    graph.graph.set_codegen(fx.graph.CodeGen())
    for node in graph.graph.find_nodes(op="call_module"):  # the exporter's guards
        graph.graph.erase_node(node)
    graph.recompile()
    return graph
