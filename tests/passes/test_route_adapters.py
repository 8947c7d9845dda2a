"""route_adapters: every adapter marker becomes two GEMMs for all agents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.graph.adapter_marker import adapter_markers
from tests.passes.stages import allowed, call, captured, peft_logits, run_until
from tests.passes.tiny_lm import Tiny, TinyAttention

IDS = torch.arange(3, 20) % 64


def _logits(graph: Any, agents: torch.Tensor) -> torch.Tensor:
    """Routed graphs still have their attention markers, so they run without a cache."""
    positions = torch.arange(len(IDS))
    return call(
        graph,
        input_ids=IDS[None],
        position_ids=positions[None],
        agent_ids=agents,
        logits_rows=positions,
    )


@pytest.mark.parametrize("shared_a", [False, True])
def test_match_and_output_agent_by_agent(shared_a: bool) -> None:
    model = Tiny(shared_a=shared_a, ranks={"plan": 4, "action": 4, "reflect": 4}).build()
    graph, report, _, _ = run_until(captured(model), "route_adapters")
    assert (report.changed, report.misses) == (2 * 3, ())  # two layers, three projections
    for agent_id, agent in enumerate([None, "plan", "action", "reflect"]):
        found = _logits(graph, torch.full_like(IDS, agent_id))
        expected = peft_logits(model, IDS, agent)
        assert float((found - expected).abs().max()) <= allowed(model, IDS, agent)


def test_distinct_a_is_multiplied_once() -> None:
    def width(shared_a: bool) -> int:
        model = Tiny(shared_a=shared_a, ranks={"plan": 4, "action": 4}).build()
        graph, _, _, _ = run_until(captured(model), "route_adapters")
        return graph.lora_a_0.shape[0]

    assert (width(False), width(True)) == (8, 4)


def test_tokens_of_one_sequence_may_have_different_agents() -> None:
    model = Tiny().build()
    graph, _, _, _ = run_until(captured(model), "route_adapters")
    mixed = _logits(graph, torch.tensor([1] * 10 + [2] * 7))
    assert torch.equal(mixed[:10], _logits(graph, torch.full_like(IDS, 1))[:10])
    assert not torch.equal(mixed[10:], _logits(graph, torch.full_like(IDS, 2))[10:])


def test_different_targets_and_ranks_per_agent() -> None:
    from peft import LoraConfig

    model = Tiny(ranks={"plan": 2}).build()
    model.add_adapter("wide", LoraConfig(r=6, lora_alpha=3, target_modules=["gamma", "delta"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B.wide" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    graph, report, _, _ = run_until(captured(model.eval()), "route_adapters")
    assert report.changed == 2 * 4
    for agent_id, agent in enumerate([None, "plan", "wide"]):
        found = _logits(graph, torch.full_like(IDS, agent_id))
        assert float((found - peft_logits(model, IDS, agent)).abs().max()) <= allowed(model, IDS, agent)


class Composed(TinyAttention):
    """One projection reads another's output as it is; one is called twice on the same input."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = self.delta(x)
        self.value_path = lambda v, p, m: v + self.gamma(x).unflatten(-1, v.shape[-2:])
        return super().forward(x, positions)


class Sorted(TinyAttention):
    """The near miss: rows of a projection are tokens in another order, two a token."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().forward(x, positions) + self.gamma(x.repeat(1, 2, 1))[:, : x.shape[1], :1]


def _tiny(kind: type[TinyAttention], *targets: str) -> Any:
    model = Tiny(targets=targets).build()
    for block in model.get_base_model().blocks:
        block.__class__ = kind
    return model


def test_projections_of_projections_and_repeated_ones_are_routed() -> None:
    model = _tiny(Composed, "alpha", "beta", "gamma", "delta")
    graph, report, _, _ = run_until(captured(model), "route_adapters")
    assert (report.changed, report.misses) == (2 * 6, ())
    for agent_id, agent in enumerate([None, "plan", "action"]):
        found = _logits(graph, torch.full_like(IDS, agent_id))
        assert float((found - peft_logits(model, IDS, agent)).abs().max()) <= allowed(model, IDS, agent)


def test_near_miss_rows_that_are_not_the_tokens() -> None:
    graph, report, _, _ = run_until(captured(_tiny(Sorted, "gamma")), "route_adapters")
    left = adapter_markers(graph)
    assert [(miss.where, miss.node) for miss in report.misses] == [(m.args[2], m.name) for m in left]
    assert [miss.where for miss in report.misses] == ["blocks.0.gamma", "blocks.1.gamma"]
    assert report.changed == 2  # the calls of the same modules whose rows are the tokens
    assert all("rows are not the tokens" in miss.reason for miss in report.misses)


def test_graph_without_lora_is_unchanged() -> None:
    base = Tiny().build().unload()
    graph, report, _, _ = run_until(captured(base), "route_adapters")
    assert report.changed == 0
    assert not any(n.op == "placeholder" and n.target == "agent_ids" for n in graph.graph.nodes)
