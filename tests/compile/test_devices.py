"""A captured graph on a CUDA device, without one: tensors that only know shape and device must agree on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lragent.compile.devices import device_named, placed
from lragent.compile.export import example_cache, example_step
from lragent.errors import RequestError
from lragent.passes.pipeline import lower, transform
from tests.passes.stages import captured
from tests.passes.tiny_lm import Tiny

CUDA = torch.device("cuda", 0)


def _fake(mode: FakeTensorMode, graph: fx.GraphModule) -> None:
    """Puts fake tensors in place of the graph's weights."""
    fakes: dict[int, Tensor] = {}
    for module in graph.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fakes.setdefault(id(tensor), mode.from_tensor(tensor))


def _run(layout: Any, place: bool) -> Tensor:
    program = transform(captured(Tiny().build()), layout)
    graph = lower(program.graph, "triton").graph
    inputs = (
        *example_step(len(program.schema.agents)).tensors(),
        *example_cache(program.schema, torch.float32).tensors(),
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        _fake(mode, graph)
        if place:
            placed(graph, CUDA)
        result: Tensor = graph(*(mode.from_tensor(t).to(CUDA) for t in inputs))
    return result


@pytest.mark.parametrize("layout", ["split", "dense"])
def test_whole_graph_runs_on_the_device(layout: str) -> None:
    assert _run(layout, place=True).device == CUDA


def test_near_miss_a_graph_that_was_not_placed() -> None:
    with pytest.raises(Exception, match="device"):
        _run("split", place=False)


def test_tied_weights_stay_tied_and_created_tensors_move() -> None:
    root = torch.nn.Module()
    root.left = torch.nn.Parameter(torch.randn(3))
    root.right = root.left
    graph = fx.Graph()
    made = graph.call_function(torch.ops.aten.arange.default, (3,), {"device": torch.device("cpu")})
    total = graph.call_function(torch.ops.aten.add.Tensor, (graph.get_attr("left"), graph.get_attr("right")))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (total, made)))
    module = placed(fx.GraphModule(root, graph), torch.device("meta"))
    assert module.left is module.right and module.left.device.type == "meta"
    assert module().device.type == "meta"
    assert root.left.device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("meta", "programs don't run on device 'meta'"),
        (f"cuda:{torch.cuda.device_count()}", f"sees {torch.cuda.device_count()} GPUs"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        device_named(name)


def test_devices_that_are_there() -> None:
    assert device_named("cpu") == torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        assert device_named(f"cuda:{index}") == torch.device("cuda", index)
    if torch.cuda.is_available():
        assert device_named("cuda") == torch.device("cuda", 0)
