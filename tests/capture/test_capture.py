"""capture: what can't be a cache is refused with its reason; each refusal stands beside a model that passes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lragent.capture.capture import capture
from lragent.errors import ModelError
from lragent.graph.attention_marker import marker_nodes
from lragent.loading.model import load_live
from tests.coverage.tiny_model import adapted_model
from tests.passes import tiny_lm
from tests.passes.tiny_lm import Tiny, TinyAttention


def _with_attention(kind: type[TinyAttention]) -> Any:
    model = Tiny().build()
    for block in model.get_base_model().blocks:
        block.__class__ = kind
    return model


def test_attention_becomes_one_marker_a_layer_with_its_facts() -> None:
    graph = capture(load_live(Tiny().build())).graph
    markers = marker_nodes(graph)
    assert [m.args[4] for m in markers] == [0, 1]
    assert [m.args[5:] for m in markers] == [(tiny_lm.DIM**-0.5, 0, 0.0)] * 2


def test_graph_has_any_number_of_tokens() -> None:
    loaded = load_live(Tiny().build())
    source = capture(loaded)
    for tokens in (1, 2, 31):
        ids, positions = torch.arange(tokens)[None], torch.arange(tokens)[None]
        with torch.no_grad():
            expected = loaded.model(input_ids=ids, position_ids=positions).logits
        torch.testing.assert_close(source.graph(ids, positions), expected, rtol=1e-5, atol=1e-5)


class Shifted(TinyAttention):
    """Adds the token before: a convolution beside attention."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().forward(x, positions) + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class Doubled(TinyAttention):
    """The near miss: adds the token itself."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().forward(x, positions) + x


def test_tokens_that_meet_outside_attention_are_refused() -> None:
    with pytest.raises(ModelError, match="mixes tokens outside attention"):
        capture(load_live(_with_attention(Shifted)))
    capture(load_live(_with_attention(Doubled)))


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_tokens_that_meet_are_seen_in_half_precision(kind: str) -> None:
    with pytest.raises(ModelError, match="mixes tokens outside attention"):
        capture(load_live(adapted_model(kind).to(torch.bfloat16)))


class FarScaled(TinyAttention):
    """Scales every token a little by the largest position of the call, as frequencies that depend on the length do."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().forward(x, positions) * (1 + positions.max() / 1024)


def test_a_token_that_depends_on_other_positions_is_refused() -> None:
    with pytest.raises(ModelError, match=r"mixes tokens outside attention|by what other positions"):
        capture(load_live(_with_attention(FarScaled)))


class NotCausal(TinyAttention):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        self.is_causal = False
        return super().forward(x, positions)


def test_attention_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ModelError, match="is not causal"):
        capture(load_live(_with_attention(NotCausal)))


class OwnAttention(TinyAttention):
    """Attention that does not go through transformers' interface."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        heads = (tiny_lm.HEADS, tiny_lm.DIM)
        q = self.alpha(x).unflatten(-1, heads).transpose(1, 2)
        scores = (q @ q.transpose(-1, -2)).tril()
        return self.delta((scores @ q).transpose(1, 2).flatten(2))


def test_attention_outside_the_interface_is_refused() -> None:
    with pytest.raises(ModelError, match="outside transformers' attention interface"):
        capture(load_live(_with_attention(OwnAttention)))


def test_live_model_is_not_changed() -> None:
    model = Tiny().build()
    model.set_adapter("action")
    model.train()
    before = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    ids, positions = torch.arange(9)[None], torch.arange(9)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions).logits
    capture(load_live(model))
    assert model.training and model.active_adapters == ["action"]
    for name, parameter in model.named_parameters():
        pointer, value, grad = before[name]
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value) and parameter.requires_grad == grad
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, position_ids=positions).logits, logits)


class NotExportable(TinyAttention):
    """Fails while it is exported, with an error that attention without a mask could give too."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise TypeError("'NoneType' object is not subscriptable")
        return super().forward(x, positions)


def test_an_error_while_exporting_is_not_taken_for_work_on_a_mask() -> None:
    with pytest.raises(ModelError, match="can't capture TinyLM: TypeError: 'NoneType'") as raised:
        capture(load_live(_with_attention(NotExportable)))
    assert "works on its mask" not in raised.value.message


class UsesWeights(TinyAttention):
    """Scales its output by the sum of attention's weights, which the interface need not give."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, tiny_lm.DIM)).transpose(1, 2) for f in (self.alpha, self.beta, self.gamma))
        attend = tiny_lm.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.with_weights)
        out, weights = attend(self, q, k, v, None, scaling=tiny_lm.DIM**-0.5)
        return self.delta(out.flatten(2)) * weights.sum(-1).mean(1)[..., None]

    @staticmethod
    def with_weights(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        out, _ = tiny_lm.eager(module, q, k, v, mask, scaling)
        return out, torch.ones(*q.shape[:-1], 2)


class CountsWeights(UsesWeights):
    """The near miss: the sum is the number of tokens, so that a token depends on how many there are."""

    @staticmethod
    def with_weights(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        out, _ = tiny_lm.eager(module, q, k, v, mask, scaling)
        return out, torch.ones(*q.shape[:-1], k.shape[2])


class ScalesByWeights(UsesWeights):
    """Attention that is not found in the graph either."""

    @staticmethod
    def with_weights(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (t.repeat_interleave(tiny_lm.HEADS // tiny_lm.KV_HEADS, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).tril()
        return (scores @ v).transpose(1, 2), scores


def test_a_model_that_fails_with_another_attention_is_checked_in_its_graph() -> None:
    def model(kind: type[TinyAttention]) -> Any:
        built = _with_attention(kind)
        built.get_base_model().config._attn_implementation = "eager"
        return built

    assert len(marker_nodes(capture(load_live(model(UsesWeights))).graph)) == 2
    with pytest.raises(ModelError, match="mixes tokens outside attention"):
        capture(load_live(model(CountsWeights)))
    reason = "does not run with another attention (AttributeError: 'NoneType' object has no attribute 'sum'): none was"
    with pytest.raises(ModelError, match=re.escape(reason)):
        capture(load_live(model(ScalesByWeights)))
