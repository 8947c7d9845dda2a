"""fuse_linears: projections of one input are one call, and compute the same."""

from __future__ import annotations

import pytest
import torch

from lragent.graph.fx_tools import calls
from lragent.kernels import cpp_library, ops
from lragent.passes.contract import LowerContext
from lragent.passes.fuse_linears import FUSE_LINEARS
from lragent.passes.pipeline import lower, transform
from tests.passes.stages import captured, peft_logits, run_cached
from tests.passes.tiny_lm import Tiny

IDS = (torch.arange(40) * 7 + 3) % 64
aten = torch.ops.aten
pytestmark = pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    cpp_library.load()


@pytest.mark.parametrize("layout", ["split", "dense"])
def test_match_and_output(layout: str) -> None:
    model = Tiny().build()
    program = transform(captured(model), layout)  # type: ignore[arg-type]
    graph = lower(program.graph, "cpp").graph
    # Of each of two layers one call for q, k and v, and those for what follows; no linear and no routed delta is left.
    assert not list(calls(graph, aten.linear.default))
    assert len(list(calls(graph, ops.routed_linears))) < len(list(calls(program.graph, aten.linear.default))) / 2
    for agent, name in ((1, "plan"), (2, "action"), (0, None)):
        found = run_cached(graph, program.schema, IDS, agent, cut=19)
        torch.testing.assert_close(found, peft_logits(model, IDS, name), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["split", "dense"])
def test_only_columns_that_go_into_the_cache_are_computed_for_all_agents(layout: str) -> None:
    program = transform(captured(Tiny().build()), layout)  # type: ignore[arg-type]
    call = next(iter(calls(lower(program.graph, "cpp").graph, ops.routed_linears)))
    _, _, _, bias_of, up_of, down_of, _ = call.args
    adapted = [down for up, down in zip(up_of, down_of, strict=True) if up >= 0]
    assert adapted and all(down >= len(bias_of) for down in adapted)
    # Query, key, value; split layout keeps key's and value's columns of all agents.
    assert len(bias_of) == {"dense": 3, "split": 5}[layout]


def test_adapters_are_part_of_the_call() -> None:
    program = transform(captured(Tiny().build()), "dense")
    first = next(iter(calls(lower(program.graph, "cpp").graph, ops.routed_linears)))
    _, _, tensors, bias_of, up_of, down_of, routes = first.args
    assert max(up_of) == len(tensors) - 1 and len(bias_of) < len(tensors)
    assert all((up >= 0) == (down >= 0) for up, down in zip(up_of, down_of, strict=True))
    assert routes[0] == len(program.schema.agents)


def test_near_miss_another_implementation_has_no_such_kernel() -> None:
    program = transform(captured(Tiny().build()), "split")
    linears = len(list(calls(program.graph, aten.linear.default)))
    assert len(list(calls(lower(program.graph, "torch").graph, aten.linear.default))) == linears


def test_near_miss_a_weight_that_is_computed_is_left() -> None:
    program = transform(captured(Tiny().build()), "split")
    graph = lower(program.graph, "reference").graph
    first = next(iter(calls(graph, aten.linear.default)))
    with graph.graph.inserting_before(first):
        first.args = (first.args[0], graph.graph.call_function(aten.mul.Tensor, (first.args[1], 1.0)), *first.args[2:])
    FUSE_LINEARS.run(graph, LowerContext("cpp"))
    assert list(calls(graph, aten.linear.default)) == [first]


def test_near_miss_a_delta_of_another_form_is_left_and_right() -> None:
    """A delta that is doubled before it is added isn't the kernel's; the projections around it are."""
    model = Tiny().build()
    source = captured(model)
    program = transform(source, "dense")
    graph = lower(program.graph, "reference").graph
    added = next(n for n in calls(graph, aten.add.Tensor) if getattr(n.args[1], "target", None) is aten.linear.default)
    with graph.graph.inserting_before(added):
        half = graph.graph.call_function(aten.mul.Tensor, (added.args[1], 0.5))
        added.args = (added.args[0], graph.graph.call_function(aten.mul.Tensor, (half, 2.0)))
    FUSE_LINEARS.run(graph, LowerContext("cpp"))
    graph.recompile()
    assert half in graph.graph.nodes
    found = run_cached(graph, program.schema, IDS, 1, cut=19)
    torch.testing.assert_close(found, peft_logits(model, IDS, "plan"), rtol=1e-5, atol=2e-5)


def test_graph_without_lora_is_fused_too() -> None:
    base = Tiny().build().unload()
    program = transform(captured(base), "split")
    graph = lower(program.graph, "cpp").graph
    assert not list(calls(graph, aten.linear.default))
    found = run_cached(graph, program.schema, IDS, 0, cut=19)
    with torch.no_grad():
        expected = base(input_ids=IDS[None], position_ids=torch.arange(len(IDS))[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
