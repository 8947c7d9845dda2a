"""graph_file: a graph that was written and read has the same code and reads the same weights."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lragent.capture.capture import capture
from lragent.compile.export import tensors_of
from lragent.compile.fingerprint import fingerprint
from lragent.errors import InternalError
from lragent.graph.graph_file import read_graph, write_graph
from lragent.graph.plain_graph import plain_graph
from lragent.loading.model import load_directories
from lragent.passes.pipeline import transform
from lragent.program.dtypes import LAYOUTS
from tests.models import write_model

aten = torch.ops.aten


def again(graph: fx.GraphModule, folder: Path) -> fx.GraphModule:
    """Writes a graph and reads it with its own weights."""
    write_graph(graph, folder / "graph.json")
    return read_graph(folder / "graph.json", tensors_of(graph))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_rewritten_programs(kind: str, tmp_path: Path) -> None:
    """One projection of q, k and v with split values, and experts; both layouts from one captured graph."""
    written = write_model(tmp_path, kind)
    captured = capture(load_directories(written.model_dir, written.adapters))
    for layout in LAYOUTS:
        program = transform(captured, layout)
        found = again(program.graph, tmp_path)
        assert found.code == program.graph.code
        assert fingerprint(found, program.schema) == fingerprint(program.graph, program.schema)
        held, read = tensors_of(program.graph), tensors_of(found)
        assert list(held) == list(read)
        assert all(held[name].data_ptr() == read[name].data_ptr() for name in held)


def arguments_graph() -> fx.GraphModule:
    """Calls with every kind of argument, tied weights, and a weight of an inner module."""
    root = nn.Module()
    root.table = nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)
    root.inner = nn.Module()
    root.inner.tied = root.table
    root.inner.register_buffer("limit", torch.tensor(2.5))
    graph = fx.Graph()
    x = graph.placeholder("x")
    rows = graph.call_function(aten.sym_size.int, (x, 0))
    more = graph.call_function(operator.add, (rows, 1))
    several = graph.call_function(torch.sym_max, (rows, more))
    wide = graph.call_function(
        aten.full.default, ([several, 4], -math.inf), {"dtype": torch.float32, "pin_memory": None}
    )
    cast = graph.call_function(aten.to.device, (wide, torch.device("cpu"), torch.float64, False, True))
    same = graph.call_function(aten.clone.default, (cast,), {"memory_format": torch.contiguous_format})
    pieces = graph.call_function(aten.split.Tensor, (same, 2, -1))
    first = graph.call_function(operator.getitem, (pieces, 0))
    total = graph.call_function(aten.cat.default, ([first, first], 1))
    table = graph.call_function(aten.add.Tensor, (graph.get_attr("table"), graph.get_attr("inner.tied")))
    limited = graph.call_function(aten.minimum.default, (table, graph.get_attr("inner.limit")))
    graph.output((graph.call_function(aten.maximum.default, (total, limited)), x))
    return fx.GraphModule(root, graph)


def test_arguments_and_weights(tmp_path: Path) -> None:
    graph = arguments_graph()
    found = again(graph, tmp_path)
    assert found.code == graph.code
    assert found.table is found.inner.tied and isinstance(found.table, nn.Parameter)
    assert [name for name, _ in found.named_buffers()] == ["inner.limit"]
    for left, right in zip(found(torch.ones(2)), graph(torch.ones(2)), strict=True):
        assert torch.equal(left, right)


class Inside(nn.Module):
    """Computes a part with autocast, which the exporter writes as a graph inside the graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x
        return y.float() + 1


def test_a_graph_in_the_graph(tmp_path: Path) -> None:
    graph = plain_graph(torch.export.export(Inside(), (torch.randn(3, 3),), strict=False))
    assert any(isinstance(module, fx.GraphModule) for name, module in graph.named_modules() if name)
    found = again(graph, tmp_path)
    x = torch.randn(3, 3)
    assert found.code == graph.code and torch.equal(found(x), graph(x))


def calling(function: Any, *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *args)))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (calling(torch.relu), "a call of .*relu.* can't be stored"),
        (calling(aten.add.Tensor, 1j), "an argument of type complex can't be stored"),
        (fx.symbolic_trace(nn.Sequential(nn.ReLU())), "is a call_module"),
    ],
)
def test_near_misses(graph: fx.GraphModule, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=reason):
        write_graph(graph, tmp_path / "graph.json")


@pytest.mark.parametrize(
    "name", ["torch.load", "operator.attrgetter", "builtins.eval", "__class__.__init__", "aten.relu"]
)
def test_a_file_can_not_name_other_functions(name: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    write_graph(calling(aten.relu.default), file)
    read_graph(file, {})
    file.write_text(file.read_text().replace("aten.relu.default", name))
    assert json.loads(file.read_text())["nodes"][1][2] == name
    with pytest.raises(InternalError, match=f"calls {name}, which is no op"):
        read_graph(file, {})
