"""masks: what an attention call says of its mask is compared with the mask, up to where they part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

import lragent
from lragent.capture.capture import capture
from lragent.errors import ModelError
from lragent.loading.model import load_live
from lragent.probing.mask_limits import AttentionCall, mask_reach, tokens_alone
from tests.coverage.tiny_config import POSITIONS, tiny_config
from tests.coverage.tiny_model import AGENTS, adapted_model, logits, plain_model

CHUNK = tiny_config(Llama4TextConfig).attention_chunk_size
WINDOW = 8


def _windowed(told: int | None, window: int = WINDOW) -> Any:
    """A model with a sliding window in its masks, whose attention is told of another one."""
    model = plain_model("gemma2")
    model.config.sliding_window = window
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = told
    return model


def test_calls_are_collected_with_the_masks_that_they_get() -> None:
    model = plain_model("gemma2")
    with tokens_alone(model) as calls:
        logits(model, [5, 40, 77])
    assert [call.window for call in calls] == [WINDOW, 0]
    assert all(call.mask is not None and call.is_as_told(POSITIONS) for call in calls)
    assert not any(AttentionCall("", WINDOW - call.window, call.mask).is_as_told(POSITIONS) for call in calls)


def test_chunks_end_the_positions_that_are_served() -> None:
    model = plain_model("llama4_text")
    assert mask_reach(model, POSITIONS, 0) == CHUNK
    assert mask_reach(plain_model("gemma2"), POSITIONS, 0) == POSITIONS


@pytest.mark.parametrize("told", [WINDOW, None, WINDOW + 1])
def test_a_window_that_attention_is_not_told_of_ends_them_too(told: int | None) -> None:
    reach = {WINDOW: POSITIONS, None: WINDOW, WINDOW + 1: WINDOW}
    assert mask_reach(_windowed(told), POSITIONS, 0) == reach[told]


def test_a_mask_that_is_another_one_from_the_start_is_refused() -> None:
    with pytest.raises(ModelError, match="attention of Gemma2Attention is under a mask that is not causal with no"):
        capture(load_live(_windowed(None, window=3)))
    capture(load_live(_windowed(3, window=3)))


def test_chunked_attention_is_served_up_to_its_first_chunk() -> None:
    model = adapted_model("llama4_text")
    engine = lragent.optimize(model, sharing="non_shared", kv_memory="4MiB", backend="eager", attention="torch")
    prompt = [5, 40, 77, 12, 90, 33, 8, 61]
    for agent in AGENTS:
        model.set_adapter(agent)
        with engine.trajectory(prompt) as t:
            found = t.generate(agent, max_new_tokens=2 * CHUNK, ignore_eos=True).token_ids
        ids = [*prompt, *found]
        assert len(ids) == CHUNK
        with torch.no_grad():
            assert logits(model, ids).argmax(-1)[len(prompt) - 1 : -1].tolist() == found
