"""attach_cache: markers become cache writes and cached attention; a chunked run equals PEFT."""

from __future__ import annotations

import pytest
import torch

from lragent.graph.fx_tools import argument, calls
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import STEP_INPUTS, cache_input_names
from tests.passes.key_paths import norm_over_heads_then_rotate, norm_then_rotate
from tests.passes.stages import allowed, captured, peft_logits, run_cached, run_until
from tests.passes.tiny_lm import Path, Tiny, keep, rotate

IDS = (torch.arange(40) * 7 + 3) % 64
lragent = torch.ops.lragent


def test_match_counts_ops_and_inputs() -> None:
    graph, report, context, state = run_until(captured(Tiny().build()), "attach_cache")
    assert report.changed == 2
    assert len(list(calls(graph, lragent.write_kv.default))) == 2
    assert len(list(calls(graph, lragent.write_lr.default))) == 4
    assert len(list(calls(graph, lragent.flash_lora_attention.default))) == 2
    schema = CacheSchema("split", context.agents, state.base_streams, state.low_rank_streams)
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    assert names == [*STEP_INPUTS, *cache_input_names(schema)]


@pytest.mark.parametrize("layout", ["split", "dense"])
@pytest.mark.parametrize(
    "key_path", [keep, rotate, norm_then_rotate, norm_over_heads_then_rotate], ids=lambda p: p.__name__
)
def test_chunked_run_over_the_cache_equals_peft(layout: str, key_path: Path) -> None:
    model = Tiny(key_path=key_path).build()
    graph, _, context, state = run_until(captured(model), "attach_cache", layout)
    schema = CacheSchema(layout, context.agents, state.base_streams, state.low_rank_streams)
    for agent_id, agent in enumerate([None, "plan", "action"]):
        found = run_cached(graph, schema, IDS, agent_id, cut=19)
        expected = peft_logits(model, IDS, agent)
        assert float((found - expected).abs().max()) <= allowed(model, IDS, agent)


def test_near_miss_a_key_without_adapter_has_no_lr_stream() -> None:
    graph, _, _, state = run_until(captured(Tiny(targets=("gamma",)).build()), "attach_cache")
    assert [stream.module for stream in state.low_rank_streams] == ["blocks.0.gamma", "blocks.1.gamma"]
    for node in calls(graph, lragent.flash_lora_attention.default):
        assert [argument(node, name) for name in ("lr_k", "lr_k_table", "b_k")] == [None] * 3


def test_graph_without_lora_gets_a_cache_without_lr_streams() -> None:
    base = Tiny().build().unload()
    graph, report, context, state = run_until(captured(base), "attach_cache")
    assert (report.changed, state.low_rank_streams, context.agents) == (2, (), ())
    assert not list(calls(graph, lragent.write_lr.default))


def test_graph_without_attention_is_unchanged() -> None:
    graph, _, context, _ = run_until(captured(Tiny().build()), "attach_cache")
    from lragent.passes.attach_cache import ATTACH_CACHE

    nodes = len(graph.graph.nodes)
    assert ATTACH_CACHE.run(graph, context).changed == 0
    assert len(graph.graph.nodes) == nodes
