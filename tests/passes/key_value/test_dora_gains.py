"""magnitudes: DoRA on K and V is applied around attention where f lets it pass, and refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lragent.graph.fx_tools import calls
from lragent.program.cache_schema import CacheSchema
from tests.passes.stages import allowed, captured, peft_logits, run_cached, run_until
from tests.passes.tiny_lm import Path, Tiny, keep, rms_norm, rotate

aten = torch.ops.aten
IDS = torch.arange(3, 40) % 64


def _model(key_path: Path, targets: tuple[str, ...], equal_pairs: bool = False) -> Any:
    """DoRA adapters with magnitudes of their own; `equal_pairs`: one factor for all channels of a module."""
    model = Tiny(key_path=key_path, targets=targets, use_dora=True).build()
    for index, module in enumerate(m for m in model.modules() if hasattr(m, "lora_magnitude_vector")):
        for key, magnitude in module.lora_magnitude_vector.items():
            update = module.lora_B[key].weight @ module.lora_A[key].weight * module.scaling[key]
            norm = (module.base_layer.weight + update).norm(dim=1).detach()
            factor = torch.tensor(1.5 + 0.1 * index) if equal_pairs else 0.5 + torch.rand_like(norm)
            magnitude.weight.data = factor * norm
    return model


@pytest.mark.parametrize(
    ("key_path", "targets", "equal_pairs"),
    [(rotate, ("alpha", "gamma"), False), (keep, ("beta", "gamma"), False), (rotate, ("beta", "gamma"), True)],
    ids=["value", "key without rotation", "rotation of equal factors"],
)
def test_split_equals_peft_for_one_agent(key_path: Path, targets: tuple[str, ...], equal_pairs: bool) -> None:
    """Alone on a trajectory, an agent's split cache is exact."""
    model = _model(key_path, targets, equal_pairs)
    graph, report, context, state = run_until(captured(model), "lower_attention")
    assert report.misses == ()
    schema = CacheSchema("split", context.agents, state.base_streams, state.low_rank_streams)
    for agent_id, agent in enumerate([None, "plan", "action"]):
        found = run_cached(graph, schema, IDS, agent_id, cut=20)
        assert float((found - peft_logits(model, IDS, agent)).abs().max()) <= allowed(model, IDS, agent)


@pytest.mark.parametrize("key_path", [rotate, rms_norm], ids=["rotation", "norm"])
def test_near_miss_unequal_factors(key_path: Path) -> None:
    _, report, _, _ = run_until(captured(_model(key_path, ("beta", "gamma"))), "split_kv")
    assert [miss.where for miss in report.misses] == ["layer 0 key", "layer 1 key"]
    assert "DoRA, whose magnitudes differ between channels" in report.misses[0].reason


def test_plain_lora_is_not_scaled() -> None:
    def scalings(use_dora: bool) -> int:
        source = captured(Tiny(targets=("gamma",), use_dora=use_dora).build())
        return sum(
            "lora_magnitude" in str(n.args[0])
            for n in calls(run_until(source, "split_kv")[0], aten.index_select.default)
        )

    assert scalings(False) == 0
    assert scalings(True) == 2
