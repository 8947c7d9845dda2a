"""rotary: where frequencies begin to depend on the length of the text is found, and export keeps them steady."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from lragent.capture.capture import capture
from lragent.errors import ModelError
from lragent.loading.model import load_live
from lragent.probing.rotary_limits import rotary_limit, steady_frequencies
from tests.coverage.rotary import ROTARY, SWITCH
from tests.coverage.tiny_config import POSITIONS
from tests.coverage.tiny_model import plain_model
from tests.passes.tiny_lm import Tiny, TinyLM


def _first_logits(model: Any, last: int) -> Tensor:
    """Logits of all tokens but the last one, which stands at a position of its own."""
    positions = torch.tensor([[*range(7), last]])
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.arange(8)[None], position_ids=positions, use_cache=False).logits
    return out[:, :-1]


@pytest.mark.parametrize("row", ROTARY)
def test_reach_is_where_later_positions_change_earlier_tokens(row: str) -> None:
    model = plain_model(row)
    reach = rotary_limit(model, POSITIONS, 0)
    assert reach == (SWITCH if "longrope" in row else POSITIONS)
    assert torch.equal(_first_logits(model, 7), _first_logits(model, reach - 1))
    if "longrope" in row or "dynamic" in row:
        assert not torch.allclose(_first_logits(model, 7), _first_logits(model, reach), atol=1e-3)


def test_reach_leaves_the_model_as_it_was() -> None:
    model = plain_model("llama with longrope")
    before, held = _first_logits(model, 7), {n: b.clone() for n, b in model.named_buffers()}
    rotary_limit(model, POSITIONS, 0)
    assert all(torch.equal(b, held[n]) for n, b in model.named_buffers())
    assert torch.equal(_first_logits(model, 7), before)


def test_frequencies_are_steady_inside_only() -> None:
    model = plain_model("llama with longrope")
    near = _first_logits(model, 7)
    with steady_frequencies(model):
        assert torch.equal(_first_logits(model, SWITCH), near)
    assert not torch.allclose(_first_logits(model, SWITCH), near, atol=1e-3)


class ScalesByTheLargest(TinyLM):
    """Positions count half in a long text, which no module of its own shows."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        halved = torch.where(positions.max() > 40, positions // 2, positions)
        return super().forward(input_ids, halved)


def test_positions_that_depend_on_others_are_refused() -> None:
    model = Tiny().build()
    model.get_base_model().__class__ = ScalesByTheLargest
    with pytest.raises(ModelError, match="treats a position by what other positions are in the call"):
        capture(load_live(model))
    capture(load_live(Tiny().build()))
