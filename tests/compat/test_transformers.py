"""One test per private API of transformers; it fails by name if the API changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BloomForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from lragent.compat import transformers as compat
from lragent.errors import InternalError

NAME = "lragent_canary"
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 16, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = 5


def tiny(kind: str, **others: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | others))).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def run(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits
    return logits


def attention_of_zeros(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    module.seen_mask = mask
    return torch.zeros_like(query.transpose(1, 2)), None


def test_can_set_attn_implementation(llama: Any) -> None:
    """PreTrainedModel._can_set_attn_implementation"""
    assert compat.attention_can_be_set(llama)
    assert not compat.attention_can_be_set(BloomForCausalLM)


def test_attn_implementation_global_mapping(llama: Any) -> None:
    """PretrainedConfig._attn_implementation, AttentionInterface._global_mapping"""
    before = run(llama)
    with compat.attention_set(llama, NAME, attention_of_zeros):
        assert NAME in AttentionInterface().valid_keys()
        assert not torch.equal(run(llama), before)
        assert llama.model.layers[0].self_attn.seen_mask is None
    assert NAME not in AttentionInterface().valid_keys()
    assert torch.equal(run(llama), before)


def test_global_mapping_of_masks(llama: Any) -> None:
    """AttentionMaskInterface._global_mapping"""
    mask = torch.ones(1, 1, TOKENS, TOKENS)
    with compat.attention_set(llama, NAME, attention_of_zeros):
        with compat.mask_registered(NAME, lambda *_, **__: mask):
            run(llama)
            assert llama.model.layers[0].self_attn.seen_mask is mask
        assert NAME not in AttentionMaskInterface().valid_keys()
        run(llama)
        assert llama.model.layers[0].self_attn.seen_mask is None


def test_keywords_of_mask_functions(llama: Any) -> None:
    """mask_function, kv_length, q_length or cache_position: keywords of functions that make masks"""
    requests = []

    def make(**given: Any) -> Tensor:
        requests.append(compat.mask_request(given))
        return torch.ones(1, 1, TOKENS, TOKENS)

    with compat.attention_set(llama, NAME, attention_of_zeros), compat.mask_registered(NAME, make):
        run(llama)
    assert [(request.queries, request.keys) for request in requests] == [(TOKENS, TOKENS)]
    first, positions = torch.tensor(0), torch.arange(TOKENS)
    seen = requests[0].function(first, first, positions[:, None], positions)
    assert torch.equal(seen, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
    with pytest.raises(InternalError, match="kv_length, mask_function"):
        compat.mask_request({"kv_length": 1, "mask_function": len})


def test_experts_implementation() -> None:
    """PretrainedConfig._experts_implementation, "batched_mm\""""
    from transformers.integrations import moe

    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    config = model.config.get_text_config()
    before, expected = config._experts_implementation, run(model)
    called = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return original(*args, **kwargs)

    interface = moe.ALL_EXPERTS_FUNCTIONS
    original = interface["batched_mm"]
    interface["batched_mm"] = recorded
    try:
        run(model)
        outside = len(called)
        with compat.gathered_experts(config):
            inside = run(model)
    finally:
        del interface["batched_mm"]
    assert outside == 0 or before == "batched_mm"
    assert len(called) == outside + 1
    assert config._experts_implementation == before
    # Two orders of the same sums, in float32.
    torch.testing.assert_close(inside, expected)


def test_config_without_experts() -> None:
    """PretrainedConfig._experts_implementation, None without experts"""
    config = tiny("llama").config
    before = getattr(config, "_experts_implementation", None)
    with compat.gathered_experts(config):
        pass
    assert getattr(config, "_experts_implementation", None) == before


def test_dynamic_rope_update(llama: Any) -> None:
    """transformers.modeling_rope_utils.dynamic_rope_update"""
    kind = type(llama.model.rotary_emb)
    plain = compat.forward_with_steady_frequencies(kind.forward)
    assert plain is not None and plain is not kind.forward
    x, positions = torch.ones(1, TOKENS, 16), torch.arange(TOKENS)[None]
    rotary = llama.model.rotary_emb
    assert all(map(torch.equal, plain(rotary, x, positions), rotary(x, positions)))
    assert compat.forward_with_steady_frequencies(plain) is None
    assert compat.forward_with_steady_frequencies(torch.no_grad()(lambda module: module)) is None


def test_conv1d_nf() -> None:
    """transformers.pytorch_utils.Conv1D.nf"""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(3, 5)
    assert compat.is_conv1d(layer) and layer.weight.shape == (5, 3)
    assert not compat.is_conv1d(nn.Linear(5, 3))


def test_embed_scale() -> None:
    """embed_scale of transformers' scaled embeddings"""
    embedding = tiny("gemma3_text").get_input_embeddings()
    scale = compat.embedding_scale(embedding)
    assert scale == 4.0  # the square root of hidden_size
    ids = torch.arange(TOKENS)
    assert torch.equal(embedding(ids), embedding.weight[ids] * scale)
    assert compat.embedding_scale(nn.Embedding(2, 2)) == compat.embedding_scale(nn.Linear(2, 2)) == 1.0


def test_checkpoint_key_conversion() -> None:
    """transformers.conversion_mapping.get_model_conversion_mapping; rename_source_key of core_model_loading"""
    convert = compat.key_conversion(tiny("mixtral", num_local_experts=4, num_experts_per_tok=2))
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert convert(kept) == (kept, False)
    router = "layers.0.block_sparse_moe.gate.lora_A.weight"
    assert convert(router) == (router.replace("block_sparse_moe", "mlp"), False)
    expert = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert convert(expert) == ("model.layers.0.mlp.experts.gate_up_proj", True)
    assert compat.key_conversion(tiny("llama"))(kept) == (kept, False)
