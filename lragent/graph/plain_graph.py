"""Converts an exported program to a bare `GraphModule`: positional inputs, one output, no guards, no in-place ops."""

from __future__ import annotations

import torch
from torch import fx

from lragent.compat.torch import OpOverload, arguments_of


def plain_graph(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The unlifted graph: weights are `get_attr` nodes whose targets are parameters of the returned module."""
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


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replaces in-place ops by functional ones; a program without in-place ops is returned unchanged.

    Before:                                      After:
        k = new_empty(x, [1, H, T, 8])               k  = new_empty(x, [1, H, T, 8])
        v = slice(k, 3, 0, 4)                        k1 = slice_scatter(k, left, 3, 0, 4)
        copy_(v, left)
    """
    writes = any(
        argument.is_written
        for node in program.graph.nodes
        if isinstance(node.target, OpOverload)
        for argument in arguments_of(node.target)
    )
    return program.run_decompositions({}) if writes else program
