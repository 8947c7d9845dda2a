"""normalize: metadata asserts and same-dtype casts go, real casts stay."""

import torch

from lragent.graph.fx_tools import calls
from lragent.graph.plain_graph import plain_graph
from lragent.passes.normalize import NORMALIZE
from lragent.passes.pipeline import rewrite_context
from tests.passes.stages import call, captured
from tests.passes.tiny_lm import Tiny

aten = torch.ops.aten


class _Casts(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.dtype) * 2).float()


def _graph(dtype: torch.dtype) -> torch.fx.GraphModule:
    return plain_graph(torch.export.export(_Casts(dtype), (torch.randn(3),), strict=False))


def _run(graph: torch.fx.GraphModule) -> int:
    context = rewrite_context(captured(Tiny(ranks={"plan": 2}).build()).loaded, "split")
    changed = NORMALIZE.run(graph, context).changed
    graph.recompile()
    return changed


def test_match_removes_every_same_dtype_cast() -> None:
    graph = _graph(torch.float32)
    casts = len(list(calls(graph, aten.to.dtype)))
    asserts = len(list(calls(graph, aten._assert_tensor_metadata.default)))
    assert casts == 2
    assert _run(graph) == casts + asserts
    assert not list(calls(graph, aten.to.dtype))


def test_near_miss_keeps_a_cast_that_changes_the_dtype() -> None:
    graph = _graph(torch.bfloat16)  # the one change: another dtype
    _run(graph)
    assert len(list(calls(graph, aten.to.dtype))) == 2


def test_graph_without_noise_is_unchanged() -> None:
    graph = _graph(torch.float32)
    _run(graph)
    nodes = [n.name for n in graph.graph.nodes]
    assert _run(graph) == 0
    assert [n.name for n in graph.graph.nodes] == nodes


def test_output_is_equal() -> None:
    source = captured(Tiny().build())
    ids, positions = torch.arange(9)[None], torch.arange(9)[None]
    before = source.graph(ids, positions)
    NORMALIZE.run(source.graph, rewrite_context(source.loaded, "split"))
    source.graph.recompile()
    assert torch.equal(before, call(source.graph, input_ids=ids, position_ids=positions))
