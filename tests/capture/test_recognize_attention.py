"""recognize_attention: attention written out in a model is found; more than scale, mask and slopes is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.capture.capture import capture
from lragent.capture.recognize_attention import RECOGNIZE_ATTENTION
from lragent.errors import ModelError
from lragent.graph.attention_marker import has_slopes, marker_nodes
from lragent.graph.passes import PassReport, run_pass
from lragent.loading.model import load_live
from lragent.program.cache_schema import CacheSchema
from tests.passes import tiny_lm
from tests.passes.stages import allowed, captured, peft_logits, run_cached, run_until
from tests.passes.tiny_lm import DIM, HEADS, KV_HEADS, Tiny, TinyAttention, keep

IDS = (torch.arange(40) * 7 + 3) % 64
Bias = Callable[[Tensor, Tensor, Tensor], Tensor]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


class WrittenOut(TinyAttention):
    """Attention by product, mask, softmax, product; `bias(i, j, x)` is added to the scores `[1, H, T, T]`."""

    bias: Bias

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = self.alpha(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k = self.key_path(self.beta(x).unflatten(-1, (KV_HEADS, DIM)), positions, self).transpose(1, 2)
        v = self.gamma(x).unflatten(-1, (KV_HEADS, DIM)).transpose(1, 2)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        scores = q @ k.transpose(-1, -2) / DIM**0.5 + self.bias(i, j, x)
        scores = scores.masked_fill(j > i, torch.finfo(scores.dtype).min)
        return self.delta((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _model(bias: Bias, key_path: tiny_lm.Path = keep) -> Any:
    model = Tiny(key_path=key_path).build()
    for block in model.get_base_model().blocks:
        block.__class__ = WrittenOut
        block.bias = bias
    # transformers reads a class's source to know whether it has the interface; here it has, but isn't used.
    return model


def none(i: Tensor, j: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(())


def slopes(i: Tensor, j: Tensor, x: Tensor) -> Tensor:
    return SLOPES * (j - i)


def window(i: Tensor, j: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(()).expand(i.shape[0], j.shape[0]).masked_fill(j <= i - 5, float("-inf"))


@pytest.mark.parametrize(("bias", "facts"), [(none, (0, False)), (slopes, (0, True)), (window, (5, False))])
def test_match_facts_of_written_out_attention(bias: Bias, facts: tuple[int, bool]) -> None:
    markers = marker_nodes(capture(load_live(_model(bias))).graph)
    assert [(m.args[6], has_slopes(m)) for m in markers] == [facts] * 2
    assert all(m.args[5] == pytest.approx(DIM**-0.5, abs=0) for m in markers)


@pytest.mark.parametrize("layout", ["split", "dense"])
@pytest.mark.parametrize("bias", [none, slopes, window])
def test_chunked_run_over_the_cache_equals_peft(layout: str, bias: Bias) -> None:
    model = _model(bias)
    graph, _, context, state = run_until(captured(model), "attach_cache", layout)
    schema = CacheSchema(layout, context.agents, state.base_streams, state.low_rank_streams)
    for agent_id, agent in enumerate([None, "plan", "action"]):
        found = run_cached(graph, schema, IDS, agent_id, cut=19)
        assert float((found - peft_logits(model, IDS, agent)).abs().max()) <= allowed(model, IDS, agent)


def curved(i: Tensor, j: Tensor, x: Tensor) -> Tensor:
    return 0.01 * (j - i) ** 2


def prefix(i: Tensor, j: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(()).expand(i.shape[0], j.shape[0]).masked_fill((j % 2 == 1) & (j < i), float("-inf"))


def by_token(i: Tensor, j: Tensor, x: Tensor) -> Tensor:
    return x[:, None, None, :, 0]


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (curved, "bias that is not linear in the position"),
        (prefix, "neither causal nor a sliding window"),
        (by_token, "more than a product of queries and keys"),
    ],
)
def test_near_misses_are_refused_with_the_node(refused: Bias, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"{reason}.*\(node softmax"):
        capture(load_live(_model(refused)))


def test_a_softcap_is_refused() -> None:
    class Capped(WrittenOut):
        def bias(self, i: Tensor, j: Tensor, x: Tensor) -> Tensor:
            return torch.zeros(())

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            with _Tanh():
                return super().forward(x, positions)

    model = _model(none)
    for block in model.get_base_model().blocks:
        block.__class__ = Capped
    with pytest.raises(ModelError, match="more than a constant factor before the softmax"):
        capture(load_live(model))


class _Tanh(torch.overrides.TorchFunctionMode):
    """Caps whatever goes into a softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.masked_fill:
            args = (args[0].tanh(), *args[1:])
        return func(*args, **(kwargs or {}))


def test_slopes_and_a_rotated_key_are_not_split() -> None:
    _, report, _, _ = run_until(captured(_model(slopes, tiny_lm.rotate)), "split_kv")
    assert "scores have a slope by position" in report.misses[0].reason
    assert run_until(captured(_model(slopes, keep)), "split_kv")[1].misses == ()


def test_more_positions_than_one_digit() -> None:
    """Positions go into the cache as two digits, so that 16-bit floats hold them."""
    from lragent.kernels.ops import SLOPE_STEP, with_slopes

    query, key = torch.zeros(1, 4, 3, DIM), torch.zeros(1, 2, 3, DIM)
    at = torch.tensor([0, SLOPE_STEP - 1, 5 * SLOPE_STEP + 7])
    q, k = with_slopes(query, key, SLOPES.flatten(), at, 0.5)
    scores = 0.5 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(scores, (SLOPES * at)[None].expand(1, 4, 3, 3))
    assert torch.equal(k.bfloat16().float(), k)


def test_each_place_that_is_left_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[PassReport] = []

    def recorded(entry: Any, graph: Any, context: Any) -> PassReport:
        reports.append(run_pass(entry, graph, context))
        return reports[-1]

    monkeypatch.setattr("lragent.capture.capture.run_pass", recorded)
    with pytest.raises(ModelError, match="more than a product") as raised:
        capture(load_live(_model(by_token)))
    (report,) = reports
    assert report.changed == 0 and [miss.where for miss in report.misses] == ["attention 0", "attention 1"]
    assert len({miss.node for miss in report.misses}) == 2
    assert raised.value.hint == RECOGNIZE_ATTENTION.hint != ""
