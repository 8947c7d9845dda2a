"""What a type's config must say beside smaller sizes, so that transformers builds its model.

Some defaults contradict each other or the sizes; published models of these types say what stands here, or its like.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_DRAFT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_DOTS = {
    "per_layer_config": {
        "2": {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 28,
            "kv_lora_rank": 20,
            "head_dim": 40,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
    }
}

# Type -> arguments of its config; those of a config inside it stand under its name.
OVERRIDES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
        "dots3_note": {
            "text_config": _DOTS,
            "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
            "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        },
        "dots3_note_text": _DOTS,
        "gemma4_assistant": {"text_config": _DRAFT},
        "qwen4_exp": {"text_config": _INDEXER},
        "qwen4_exp_text": _INDEXER,
        "reformer": {
            "attn_layers": ["local", "lsh"],
            "attention_head_size": 16,
            "axial_pos_embds_dim": (32, 32),
            "axial_pos_shape": (16, 16),
            "hash_seed": 0,
        },
    }
)
