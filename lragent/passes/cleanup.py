"""The last pass: removes dead code, and checks that no marker is left and that the graph takes the step inputs."""

from __future__ import annotations

from torch import fx

from lragent.errors import InternalError
from lragent.graph.attention_marker import marker_nodes
from lragent.graph.passes import Pass, PassReport
from lragent.passes.contract import LowerContext
from lragent.program.step import STEP_INPUTS


def _run(graph: fx.GraphModule, context: LowerContext) -> PassReport:
    before = len(graph.graph.nodes)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    if marker_nodes(graph):
        raise InternalError("an attention marker is left in the lowered graph")
    inputs = tuple(str(n.target) for n in graph.graph.nodes if n.op == "placeholder")
    if inputs[: len(STEP_INPUTS)] != STEP_INPUTS:
        raise InternalError(f"the lowered graph takes {inputs[: len(STEP_INPUTS)]}, not the step inputs")
    return PassReport(before - len(graph.graph.nodes))


CLEANUP = Pass("cleanup", _run)
