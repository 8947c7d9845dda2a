"""lower_attention: the attention op becomes the chosen implementation, with the same result."""

from __future__ import annotations

import pytest
import torch

from lragent.graph.fx_tools import calls
from lragent.kernels.implementations import GRAPHS
from lragent.passes.contract import LowerContext
from lragent.passes.lower_attention import LOWER_ATTENTION
from lragent.passes.pipeline import lower, transform
from tests.passes.key_paths import norm_over_heads, norm_then_rotate
from tests.passes.stages import captured, peft_logits, run_cached
from tests.passes.tiny_lm import Path, Tiny

IDS = (torch.arange(40) * 7 + 3) % 64
OP = torch.ops.lragent.flash_lora_attention.default


@pytest.mark.parametrize("attention", ["reference", "torch"])
def test_match_and_output(attention: str) -> None:
    model = Tiny().build()
    program = transform(captured(model), "split")
    graph = lower(program.graph, attention).graph
    assert len(list(calls(graph, GRAPHS[attention].target))) == 2
    found = run_cached(graph, program.schema, IDS, 2, cut=19)
    torch.testing.assert_close(found, peft_logits(model, IDS, "action"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("key_path", "ops"), [(norm_over_heads, "torch"), (norm_then_rotate, "inductor_decode")])
def test_a_norm_over_all_heads_runs_torch_and_says_so(key_path: Path, ops: str) -> None:
    source = captured(Tiny(key_path=key_path).build())
    graph = transform(source, "split").graph
    report = LOWER_ATTENTION.run(graph, LowerContext("inductor_decode"))
    assert len(list(calls(graph, GRAPHS[ops].target))) == report.changed == 2
    assert [miss.where for miss in report.misses] == (["layer 0", "layer 1"] if ops == "torch" else [])
    assert all("no norm over all heads" in miss.reason for miss in report.misses)


def test_the_rewritten_graph_is_not_changed() -> None:
    program = transform(captured(Tiny().build()), "split")
    lower(program.graph, "torch")
    assert len(list(calls(program.graph, OP))) == 2


def test_near_miss_a_lowered_graph_has_nothing_to_lower() -> None:
    source = captured(Tiny().build())
    program = transform(source, "split")
    graph = lower(program.graph, "torch").graph
    assert LOWER_ATTENTION.run(graph, LowerContext("torch")).changed == 0


def test_graph_without_lora_is_lowered_too() -> None:
    base = Tiny().build().unload()
    program = transform(captured(base), "split")
    assert len(list(calls(lower(program.graph, "torch").graph, GRAPHS["torch"].target))) == 2
