"""split_kv: base and low-rank streams of K and V, and refusals, each next to a near miss that splits.

Forms of keys are in `test_split_kv_keys.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes import tiny_lm as tiny
from tests.passes.key_paths import clipped
from tests.passes.stages import allowed, call, captured, peft_logits, run_until, split_report
from tests.passes.tiny_lm import DIM, Path, Tiny, keep, rotate

IDS = torch.arange(3, 20) % 64


def test_match_counts_each_split_stream() -> None:
    report, state = split_report()
    assert (report.changed, report.misses) == (4, ())  # K and V of two layers
    key, value = next(iter(state.split.values()))
    assert key.transform.kind == "rotary" and key.transform.final
    assert key.lora_b.heads.channel_HD.shape == (2, DIM)
    assert (len(key.lora_b.modules), key.lora_b.starts, key.lora_b.channels) == (1, (0,), 2 * DIM)
    assert value.transform is None


@pytest.mark.parametrize(
    ("refused", "reason", "splits"),
    [
        (clipped, "a computation that is not linear", lambda x, p, m: 2.0 * x),
        (rotate, "the value depends on the position", keep),
    ],
    ids=["clipped", "rotated"],
)
def test_refused_values_and_their_near_miss(refused: Path, reason: str, splits: Path) -> None:
    report, _ = split_report(value_path=refused)
    assert [miss.where for miss in report.misses] == ["layer 0 value", "layer 1 value"]
    assert all(reason in miss.reason for miss in report.misses)
    near, _ = split_report(value_path=splits)
    assert near.misses == ()


def test_key_summed_from_two_projections_is_refused_and_near_miss_splits() -> None:
    class TwoSources(tiny.TinyAttention):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            k2 = self.gamma(x).unflatten(-1, (tiny.KV_HEADS, DIM))
            self.key_path = lambda k, p, m: rotate(k, p, m) + (k2 if self.two else 0)
            return super().forward(x, positions)

    def report(two: bool) -> Any:
        model = Tiny().build()
        for block in model.get_base_model().blocks:
            block.__class__ = TwoSources
            block.two = two
        return run_until(captured(model), "split_kv")[1]

    refused = report(two=True)
    assert "is not one channel of the projection" in refused.misses[0].reason
    assert report(two=False).misses == ()


def test_projection_without_adapter_stays_as_it_is() -> None:
    report, state = split_report(key_path=clipped, targets=("alpha", "gamma"))  # any key path will do
    assert (report.changed, report.misses) == (2, ())
    key, _ = next(iter(state.split.values()))
    assert key.routed is None


def test_graph_without_lora_is_unchanged() -> None:
    base = Tiny().build().unload()
    source = captured(base)
    nodes = [n.name for n in run_until(source, "route_adapters")[0].graph.nodes]
    graph, report, _, _ = run_until(captured(base), "split_kv")
    assert report.changed == 0
    assert [n.name for n in graph.graph.nodes] == nodes


def test_dense_layout_is_left_alone_and_equal_to_peft() -> None:
    model = Tiny().build()
    graph, report, _, _ = run_until(captured(model), "split_kv", layout="dense")
    assert report.changed == 0
    positions = torch.arange(len(IDS))
    found = call(
        graph,
        input_ids=IDS[None],
        position_ids=positions[None],
        agent_ids=torch.full_like(IDS, 1),
        logits_rows=positions,
    )
    assert float((found - peft_logits(model, IDS, "plan")).abs().max()) <= allowed(model, IDS, "plan")


def test_split_graph_attends_to_base_streams_only() -> None:
    """Until the cache is attached, a split graph's K and V are the base model's, whoever acts."""
    model = Tiny(targets=("beta", "gamma")).build()
    graph, _, _, _ = run_until(captured(model), "split_kv")
    positions = torch.arange(len(IDS))
    found = call(
        graph,
        input_ids=IDS[None],
        position_ids=positions[None],
        agent_ids=torch.full_like(IDS, 2),
        logits_rows=positions,
    )
    assert float((found - peft_logits(model, IDS, None)).abs().max()) <= allowed(model, IDS, None)


class MisleadinglyNamed(tiny.TinyAttention):
    """Every projection under the name that another one usually has."""

    def rename(self) -> None:
        for new, old in (("v_proj", "alpha"), ("q_proj", "beta"), ("k_proj", "gamma"), ("up_proj", "delta")):
            self.add_module(new, self._modules.pop(old))

    def __getattr__(self, name: str) -> Any:
        usual = {"alpha": "v_proj", "beta": "q_proj", "gamma": "k_proj", "delta": "up_proj"}
        return super().__getattr__(usual.get(name, name) if name not in self._modules else name)


def test_names_of_modules_do_not_matter() -> None:
    model = Tiny().build()
    for block in model.get_base_model().blocks:
        block.__class__ = MisleadinglyNamed
        block.rename()
    _, report, _, state = run_until(captured(model), "split_kv")
    assert (report.changed, report.misses) == (4, ())
    key, value = next(iter(state.split.values()))
    assert (key.routed.module, value.routed.module) == ("blocks.0.q_proj", "blocks.0.k_proj")
