"""masks: what an attention call says of its mask is compared with the mask, up to where they part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, chunked_causal_mask_function
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

import lragent
from lragent.capture.capture import capture
from lragent.errors import InternalError, ModelError
from lragent.loading.model import load_live
from lragent.probing.mask_limits import ProbedCall, make_mask, mask_limit, tokens_alone
from tests.coverage.tiny_config import POSITIONS, tiny_config
from tests.coverage.tiny_model import AGENTS, adapted_model, logits, plain_model
from tests.passes import tiny_lm
from tests.passes.tiny_lm import Tiny, TinyAttention

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
    assert all(call.mask is not None and call.mask_is_as_declared(POSITIONS) for call in calls)
    assert not any(ProbedCall("", WINDOW - call.window, call.mask).mask_is_as_declared(POSITIONS) for call in calls)


def test_chunks_end_the_positions_that_are_served() -> None:
    model = plain_model("llama4_text")
    assert mask_limit(model, POSITIONS, 0) == CHUNK
    assert mask_limit(plain_model("gemma2"), POSITIONS, 0) == POSITIONS


@pytest.mark.parametrize("told", [WINDOW, None, WINDOW + 1])
def test_a_window_that_attention_is_not_told_of_ends_them_too(told: int | None) -> None:
    reach = {WINDOW: POSITIONS, None: WINDOW, WINDOW + 1: WINDOW}
    assert mask_limit(_windowed(told), POSITIONS, 0) == reach[told]


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


# Keywords that transformers' masks are made by: (newer, 5.0.0).
SIGNATURES = [
    {"q_length": 7, "q_offset": 0, "device": torch.device("cpu")},
    {"cache_position": torch.arange(7)},
]


@pytest.mark.parametrize("of_query", SIGNATURES)
def test_masks_are_known_again_under_both_signatures_of_transformers(of_query: dict[str, Any]) -> None:
    made: list[Any] = []
    chunked = chunked_causal_mask_function(CHUNK, torch.zeros(1, dtype=torch.int64))
    for function in (causal_mask_function, chunked):
        mask = make_mask(
            made,
            batch_size=1,
            kv_length=7,
            kv_offset=0,
            mask_function=function,
            attention_mask=None,
            allow_is_causal_skip=True,
            local_size=None,
            dtype=torch.float32,
            config=None,
            use_vmap=False,
            **of_query,
        )
        assert mask.shape == (1, 1, 7, 7) and made[int(mask[0, 0, 0, 0])] is function
    assert [ProbedCall("", 0, f).mask_is_as_declared(CHUNK) for f in made] == [True, True]
    assert [ProbedCall("", 0, f).mask_is_as_declared(CHUNK + 1) for f in made] == [True, False]


def test_another_signature_is_an_error_that_names_it() -> None:
    with pytest.raises(InternalError, match="kv_length, mask_function, queries"):
        make_mask([], queries=7, kv_length=7, mask_function=causal_mask_function)
    with pytest.raises(InternalError, match="kv_length, q_length"):
        make_mask([], q_length=7, kv_length=7)


def test_chunks_are_found_where_masks_are_made_as_in_transformers_5_0(monkeypatch: pytest.MonkeyPatch) -> None:
    _register_with(monkeypatch, lambda q_length, q_offset, device, **given: {"cache_position": torch.arange(q_length)})
    assert mask_limit(plain_model("llama4_text"), POSITIONS, 0) == CHUNK


def test_an_unknown_signature_does_not_switch_the_check_off(monkeypatch: pytest.MonkeyPatch) -> None:
    _register_with(monkeypatch, lambda q_length, q_offset, device, **given: {"queries": q_length})
    with pytest.raises(InternalError, match="queries"):
        mask_limit(plain_model("llama4_text"), POSITIONS, 0)


def _register_with(monkeypatch: pytest.MonkeyPatch, of_query: Callable[..., dict[str, Any]]) -> None:
    """Masks are made by other keywords than those of the installed transformers."""
    register = AttentionMaskInterface.register

    def renamed(name: str, function: Callable[..., Any]) -> None:
        def called(**given: Any) -> Any:
            kept = {key: value for key, value in given.items() if key not in ("q_length", "q_offset", "device")}
            return function(**kept, **of_query(**given))

        register(name, called)

    monkeypatch.setattr(AttentionMaskInterface, "register", renamed)


TINY_CHUNK = 40  # more than the tokens by which a captured graph is compared with its model


class Masked(TinyAttention):
    """Attention under the mask that transformers makes, as `seen` changes it."""

    chunk = 0
    seen: Callable[[Tensor | None, Tensor], Tensor | None]

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = tiny_lm.rotate(self.alpha(x).unflatten(-1, (tiny_lm.HEADS, tiny_lm.DIM)), positions, self)
        k = self.key_path(self.beta(x).unflatten(-1, (tiny_lm.KV_HEADS, tiny_lm.DIM)), positions, self)
        v = self.gamma(x).unflatten(-1, (tiny_lm.KV_HEADS, tiny_lm.DIM))
        attend = tiny_lm.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, under_mask)
        mask = type(self).seen(_mask(self.config, x, self.chunk), x)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, _ = attend(self, q, k, v, mask, scaling=tiny_lm.DIM**-0.5)
        return self.delta(out.flatten(2))


def under_mask(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
    k, v = (t.repeat_interleave(tiny_lm.HEADS // tiny_lm.KV_HEADS, 1) for t in (k, v))
    scores = scaling * q @ k.transpose(-1, -2)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def _mask(config: Any, x: Tensor, chunk: int) -> Tensor | None:
    """Of bools for attention written out; what the interface's mask function makes; None if it has none."""
    tokens = x.shape[1]
    function = chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64)) if chunk else causal_mask_function
    if config._attn_implementation != "eager":
        make = AttentionMaskInterface._global_mapping.get(config._attn_implementation)
        return make and make(batch_size=1, q_length=tokens, kv_length=tokens, mask_function=function)
    rows, columns, zero = torch.arange(tokens)[:, None], torch.arange(tokens), torch.tensor(0)
    return function(zero, zero, rows, columns)[None, None]


def _masked(seen: Callable[[Tensor | None, Tensor], Tensor | None], chunk: int = 0) -> Any:
    model = Tiny().build()
    model.get_base_model().config._attn_implementation = "eager"
    kind = type("OfMask", (Masked,), {"seen": staticmethod(seen), "chunk": chunk})
    for block in model.get_base_model().blocks:
        block.__class__ = kind
    return model


def as_it_is(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return mask


def cut(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Works on the mask, and on none it can't."""
    return mask[..., : x.shape[1]]  # type: ignore[index]


def combined(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Works on a mask of bools only, and does without one."""
    return mask if mask is None else mask & torch.ones(x.shape[1], x.shape[1]).bool()


def added(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Hides a token that the mask does not hide."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask + torch.arange(x.shape[1])


@pytest.mark.parametrize("seen", [as_it_is, cut, combined])
def test_models_that_work_on_their_causal_mask_are_captured(seen: Any) -> None:
    loaded = load_live(_masked(seen))
    assert loaded.max_positions == tiny_lm.POSITIONS
    graph = capture(loaded).graph
    ids = torch.arange(60)[None] % tiny_lm.VOCAB
    with torch.no_grad():
        expected = loaded.model(input_ids=ids).logits
        torch.testing.assert_close(graph(ids, torch.arange(60)[None]), expected, rtol=1e-5, atol=1e-5)


def test_chunks_of_a_model_that_works_on_its_mask_are_not_taken_for_causal() -> None:
    for seen in (as_it_is, cut):
        loaded = load_live(_masked(seen, TINY_CHUNK))
        assert loaded.max_positions == TINY_CHUNK
        capture(loaded)
    with pytest.raises(ModelError, match=r"does not run with another attention .*neither causal nor a sliding window"):
        capture(load_live(_masked(combined, TINY_CHUNK)))


def test_a_mask_that_is_not_transformers_own_is_refused() -> None:
    with pytest.raises(ModelError, match="attention of OfMask adds a mask or bias of its own"):
        capture(load_live(_masked(added, TINY_CHUNK)))


class KeysOfPairs(TinyAttention):
    """Adds a key for all tokens before: there are more keys than tokens."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        def longer(t: Tensor) -> Tensor:
            return torch.cat([t, t.mean(2, keepdim=True)], 2)

        q = self.alpha(x).unflatten(-1, (tiny_lm.HEADS, tiny_lm.DIM)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (tiny_lm.KV_HEADS, tiny_lm.DIM)).transpose(1, 2) for f in (self.beta, self.gamma))
        attend = tiny_lm.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, tiny_lm.eager)
        out, _ = attend(self, q, longer(k), longer(v), None, scaling=tiny_lm.DIM**-0.5)
        return self.delta(out.flatten(2))


def test_keys_that_are_not_one_a_token_are_refused() -> None:
    model = Tiny().build()
    for block in model.get_base_model().blocks:
        block.__class__ = KeysOfPairs
    with pytest.raises(ModelError, match="attention of KeysOfPairs has 8 keys for 7 queries"):
        load_live(model)
