"""pipeline: reports of passes are kept, required passes refuse, and no adapter marker stays in a program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from lragent.errors import InternalError, Miss, SplitRefused
from lragent.graph.adapter_marker import ADAPTER_MARKER
from lragent.graph.passes import Pass, PassReport
from lragent.kernels.implementations import GRAPHS, IMPLEMENTATION_OF
from lragent.passes import LOWER, REWRITE, pipeline
from lragent.passes.contract import RewriteContext
from lragent.passes.pipeline import lower, transform
from lragent.program.cache_schema import Layout
from tests.passes.key_paths import clipped, norm_over_heads, norm_then_rotate
from tests.passes.stages import captured
from tests.passes.tiny_lm import Path, Tiny

MISSES = tuple(Miss(f"place {index}", f"node_{index}", "no reason") for index in range(6))


def _reporting(misses: tuple[Miss, ...], required: bool) -> Pass[RewriteContext]:
    def run(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
        return PassReport(0, misses)

    return Pass("invented", run, required=required, hint="Do this." if required else "")


def _softmax_after_the_head() -> Any:
    model = Tiny().build()
    head = model.get_base_model().head
    model.get_base_model().head = torch.nn.Sequential(head, torch.nn.Softmax(-1))
    return model


def test_every_report_is_kept() -> None:
    program = transform(captured(Tiny().build()), "split")
    assert list(program.reports) == [entry.name for entry in REWRITE]
    assert program.reports["attach_cache"].changed == 2 and program.misses == ()
    reports = lower(program.graph, "torch").reports
    assert list(reports) == [entry.name for entry in LOWER]
    assert reports["lower_attention"].changed == 2


def test_a_miss_of_a_pass_that_is_not_required_stays_in_the_reports() -> None:
    (miss,) = transform(captured(_softmax_after_the_head()), "split").misses
    assert miss.where == "logits" and "all rows are computed" in miss.reason


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_a_required_pass_refuses_with_its_own_hint(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "REWRITE", (_reporting(MISSES[:count], required=True), *REWRITE))
    with pytest.raises(SplitRefused) as refused:
        transform(captured(Tiny().build()), "dense")
    error = refused.value
    assert error.misses == MISSES[:count] and error.hint == "Do this."
    assert error.message.count("(node ") == min(count, 4)
    more = f"and {count - 4} more; `lragent inspect MODEL --adapters ...` lists all"
    assert error.message.endswith(more) == (count > 4)


def test_the_same_pass_refuses_nothing_if_it_is_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "REWRITE", (_reporting(MISSES, required=False), *REWRITE))
    assert transform(captured(Tiny().build()), "dense").misses == MISSES


def test_required_passes_have_a_hint() -> None:
    assert [entry.name for entry in REWRITE if entry.required] == ["route_adapters", "split_kv"]
    assert all(bool(entry.hint) == entry.required for entry in REWRITE)


def test_keys_that_can_not_be_split_are_all_named() -> None:
    source = captured(Tiny(key_path=clipped, layers=5, targets=("beta",)).build())
    with pytest.raises(SplitRefused, match="and 1 more") as refused:
        transform(source, "split")
    assert [miss.where for miss in refused.value.misses] == [f"layer {index} key" for index in range(5)]
    assert "layout dense" in refused.value.hint


@pytest.mark.parametrize("attention", GRAPHS)
@pytest.mark.parametrize("key_path", [norm_over_heads, norm_then_rotate], ids=lambda p: p.__name__)
def test_fallback_layers_are_known_before_lowering(attention: str, key_path: Path) -> None:
    program = transform(captured(Tiny(key_path=key_path).build()), "split")
    fallback = program.fallbacks.get(attention, ())
    assert fallback == lower(program.graph, attention).fallback
    wide = key_path is norm_over_heads and not IMPLEMENTATION_OF[attention].wide_norms
    assert [miss.where for miss in fallback] == (["layer 0", "layer 1"] if wide else [])


def _marks_again(graph: fx.GraphModule, context: RewriteContext) -> PassReport:
    """A rewrite that puts an adapter marker around the logits."""
    output = graph.graph.output_node()
    logits = output.args[0]
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(ADAPTER_MARKER, (logits, logits, "blocks.1.beta")),)
    return PassReport(1)


@pytest.mark.parametrize("layout", ["split", "dense"])
def test_an_adapter_marker_that_is_left_is_an_internal_error(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "REWRITE", (*REWRITE, Pass("careless", _marks_again)))
    with pytest.raises(InternalError, match=r"adapter marker of blocks\.1\.beta is left"):
        transform(captured(Tiny().build()), layout)


def test_unrouted_adapters_are_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = tuple(entry for entry in REWRITE if entry.name != "route_adapters")
    monkeypatch.setattr(pipeline, "REWRITE", routed)
    with pytest.raises(InternalError, match="is left in the rewritten graph"):
        transform(captured(Tiny().build()), "dense")
