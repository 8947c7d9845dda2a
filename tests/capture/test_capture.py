"""capture: what can't be a cache is refused with its reason; each refusal stands beside a model that passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lragent.capture.capture import capture
from lragent.errors import ModelError
from lragent.graph.attention_marker import marker_nodes
from lragent.loading.model import load_live
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
    """Mixes tokens by attention's weights, which the interface need not give, and has a convolution beside it."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        heads = (tiny_lm.KV_HEADS, tiny_lm.DIM)
        q, k, v = (f(x).unflatten(-1, (-1, heads[1])).transpose(1, 2) for f in (self.alpha, self.beta, self.gamma))
        attend = tiny_lm.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _with_weights)
        out, weights = attend(self, q, k, v, None, scaling=tiny_lm.DIM**-0.5)
        return self.delta(out.flatten(2)) * weights.sum(-1).mean(1)[..., None]


def _with_weights(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    out, _ = tiny_lm.eager(module, q, k, v, mask, scaling)
    return out, torch.ones(q.shape[:-1] + k.shape[2:3])


def test_a_model_that_fails_with_another_attention_is_refused_with_the_reason() -> None:
    model = _with_attention(UsesWeights)
    model.get_base_model().config._attn_implementation = "eager"
    reason = "does not run with another attention .AttributeError: 'NoneType' object has no attribute 'sum'"
    with pytest.raises(ModelError, match=reason):
        capture(load_live(model))
