"""select_logits: rows are picked before the LM head, through what treats every logit alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lragent.graph.fx_tools import calls
from lragent.passes.pipeline import rewrite_context
from lragent.passes.select_logits import SELECT_LOGITS
from tests.passes.stages import allowed, call, captured, peft_logits, run_until
from tests.passes.tiny_lm import Tiny, TinyLM

aten = torch.ops.aten


class _Head(nn.Module):
    """The LM head with something after it."""

    def __init__(self, linear: nn.Linear, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.after = linear, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x))


def _source(after: Callable[[Tensor], Tensor]) -> Any:
    model = Tiny().build()
    base = model.get_base_model()
    assert isinstance(base, TinyLM)
    base.head = _Head(base.head, after)
    return captured(model)


@pytest.mark.parametrize("after", [lambda x: x, lambda x: torch.tanh(x / 5) * 5], ids=["plain", "softcap"])
def test_match_selects_before_the_head(after: Callable[[Tensor], Tensor]) -> None:
    source = _source(after)
    ids, positions, rows = torch.arange(9)[None], torch.arange(9)[None], torch.tensor([2, 8])
    before = source.graph(ids, positions)
    report = SELECT_LOGITS.run(source.graph, rewrite_context(source.loaded, "split"))
    source.graph.recompile()
    assert (report.changed, report.misses) == (1, ())
    (selected,) = calls(source.graph, aten.index_select.default)
    assert next(iter(selected.users)).target is aten.linear.default
    found = call(source.graph, input_ids=ids, position_ids=positions, logits_rows=rows)
    # One row of a GEMM against many: sums may be ordered otherwise.
    torch.testing.assert_close(found, before[0, rows], rtol=1e-5, atol=1e-5)


def test_near_miss_softmax_over_logits_is_reported_and_still_right() -> None:
    source = _source(lambda x: x.softmax(-1))
    ids, positions, rows = torch.arange(9)[None], torch.arange(9)[None], torch.tensor([2, 8])
    before = source.graph(ids, positions)
    report = SELECT_LOGITS.run(source.graph, rewrite_context(source.loaded, "split"))
    source.graph.recompile()
    assert "no linear op found behind the logits" in report.misses[0].reason
    found = call(source.graph, input_ids=ids, position_ids=positions, logits_rows=rows)
    assert torch.equal(found, before[0, rows])


def test_second_run_changes_nothing() -> None:
    source = _source(lambda x: x)
    context = rewrite_context(source.loaded, "split")
    SELECT_LOGITS.run(source.graph, context)
    nodes = len(source.graph.graph.nodes)
    assert SELECT_LOGITS.run(source.graph, context).changed == 0
    assert len(source.graph.graph.nodes) == nodes


def test_an_adapted_lm_head_is_computed_for_selected_rows_only() -> None:
    model = Tiny(targets=("gamma", "head")).build()
    graph, report, _, _ = run_until(captured(model), "route_adapters")
    assert report.misses == ()
    ids, rows = torch.arange(3, 12), torch.tensor([8, 2])
    for agent_id, agent in enumerate([None, "plan", "action"]):
        found = call(
            graph,
            input_ids=ids[None],
            position_ids=torch.arange(9)[None],
            agent_ids=torch.full_like(ids, agent_id),
            logits_rows=rows,
        )
        expected = peft_logits(model, ids, agent)[rows]
        assert float((found - expected).abs().max()) <= allowed(model, ids, agent)
