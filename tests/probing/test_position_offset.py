"""positions: offsets are found, rows that a graph counts itself come from the input, what else counts is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from lragent.capture.capture import capture
from lragent.errors import ModelError
from lragent.loading.model import load_live
from lragent.probing.position_offset import position_offset
from lragent.probing.rotary_limits import rotary_limit
from tests.passes.tiny_lm import POSITIONS, VOCAB, Tiny, TinyLM


def _with_forward(kind: type[TinyLM]) -> Any:
    model = Tiny().build()
    model.get_base_model().__class__ = kind
    return model


class StartsAtTwo(TinyLM):
    """Counts from 2 unless it is told."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        own = torch.arange(input_ids.shape[1])[None] + 2
        return super().forward(input_ids, own if position_ids is None else position_ids)


class CountsItself(TinyLM):
    """Takes no positions: sums ones."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        return super().forward(input_ids, torch.ones_like(input_ids).cumsum(1) + 1)


class CountsBackwards(CountsItself):
    """The near miss: a position depends on how many tokens there are."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        length = input_ids.shape[1]
        return TinyLM.forward(self, input_ids, length - torch.arange(length)[None])


class WithoutInput(TinyLM):
    """Has no input for positions, and counts from 2."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:  # type: ignore[override]
        return super().forward(input_ids, torch.ones_like(input_ids).cumsum(1) + 1)


class BrokenByPositions(TinyLM):
    """Has the input, and fails with the kind of error that a missing input gives."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        if position_ids is not None:
            raise TypeError("forward() got an unexpected keyword argument 'scale'")
        return super().forward(input_ids, position_ids)


def test_offset_of_a_model_that_counts_from_two() -> None:
    assert position_offset(Tiny().build().get_base_model(), VOCAB) == 0
    loaded = load_live(_with_forward(StartsAtTwo))
    assert (loaded.position_offset, loaded.max_positions) == (2, POSITIONS - 2)


@pytest.mark.parametrize("kind", [StartsAtTwo, CountsItself, WithoutInput])
def test_graph_counts_as_the_model_does(kind: type[TinyLM]) -> None:
    source = capture(load_live(_with_forward(kind)))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = source.loaded.model(input_ids=ids).logits
        found = source.graph(ids, torch.arange(17)[None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_near_miss_positions_that_depend_on_the_length_are_refused() -> None:
    with pytest.raises(ModelError, match="mixes tokens outside attention"):
        capture(load_live(_with_forward(CountsBackwards)))


def test_a_type_error_from_inside_is_not_a_missing_input() -> None:
    model = _with_forward(BrokenByPositions).get_base_model()
    for check in (lambda: position_offset(model, VOCAB), lambda: rotary_limit(model, POSITIONS, 0)):
        with pytest.raises(ModelError, match=r"on token ids and positions: forward\(\) got an unexpected"):
            check()
