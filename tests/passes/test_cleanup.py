"""cleanup: dead code goes; a graph that is not what a lowered program must be is an internal error."""

from __future__ import annotations

import pytest
import torch

from lragent.errors import InternalError
from lragent.passes.cleanup import CLEANUP
from lragent.passes.contract import LowerContext
from lragent.passes.pipeline import lower, transform
from tests.passes.stages import captured, run_cached, run_until
from tests.passes.tiny_lm import Tiny

IDS = (torch.arange(40) * 7 + 3) % 64


def test_match_removes_dead_nodes_and_keeps_writes() -> None:
    program = transform(captured(Tiny().build()), "split")
    graph = lower(program.graph, "torch").graph
    nodes = len(graph.graph.nodes)
    with graph.graph.inserting_before(graph.graph.output_node()):
        graph.graph.call_function(torch.ops.aten.relu.default, (graph.graph.output_node().args[0],))
    report = CLEANUP.run(graph, LowerContext("torch"))
    assert report.changed == 1
    assert len(graph.graph.nodes) == nodes


def test_near_miss_an_attention_marker_is_left() -> None:
    source = captured(Tiny().build())
    graph, _, _, _ = run_until(source, "split_kv")
    with pytest.raises(InternalError, match="attention marker is left"):
        CLEANUP.run(graph, LowerContext("torch"))


def test_clean_graph_is_unchanged_and_gives_the_same_output() -> None:
    source = captured(Tiny().build())
    program = transform(source, "split")
    graph = lower(program.graph, "torch").graph
    before = run_cached(graph, program.schema, IDS, 1, cut=10)
    assert CLEANUP.run(graph, LowerContext("torch")).changed == 0
    assert torch.equal(before, run_cached(graph, program.schema, IDS, 1, cut=10))
