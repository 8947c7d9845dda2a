"""Tiny configurations of the architectures that the tests cover, and which of their modules take adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB, POSITIONS = 128, 256
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_WINDOWED = {"sliding_window": 8, "head_dim": 16}


def _windowed_layers(layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]


@dataclass(frozen=True)
class Architecture:
    """A tiny config by number of layers, and modules for adapters: queries and values, keys and values, all linear."""

    config: Callable[[int], PretrainedConfig]
    qv: tuple[str, ...] = ("q_proj", "v_proj")
    kv: tuple[str, ...] = ("k_proj", "v_proj")
    all_linear: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    fan_in_fan_out: bool = False

    def modules(self, targets: str) -> tuple[str, ...]:
        return {"qv": self.qv, "kv": self.kv, "all": self.all_linear}[targets]


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda n: LlamaConfig(num_hidden_layers=n, **_COMMON)),
    "qwen2": Architecture(lambda n: Qwen2Config(num_hidden_layers=n, **_COMMON)),
    "qwen3": Architecture(lambda n: Qwen3Config(head_dim=16, num_hidden_layers=n, **_COMMON)),
    "gemma3_text": Architecture(
        lambda n: Gemma3TextConfig(
            query_pre_attn_scalar=16, layer_types=_windowed_layers(n), **_WINDOWED, num_hidden_layers=n, **_COMMON
        )
    ),
    "gpt2": Architecture(
        lambda n: GPT2Config(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=64, n_layer=n, n_head=4),
        qv=("c_attn",),
        kv=("c_attn",),
        all_linear=("c_attn", "c_proj", "c_fc"),
        fan_in_fan_out=True,
    ),
    "gpt_neox": Architecture(
        lambda n: GPTNeoXConfig(
            rotary_pct=0.25,
            num_hidden_layers=n,
            **{name: size for name, size in _COMMON.items() if name != "num_key_value_heads"},
        ),
        qv=("query_key_value",),
        kv=("query_key_value",),
        all_linear=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "phi3": Architecture(
        lambda n: Phi3Config(pad_token_id=0, num_hidden_layers=n, **_COMMON),
        qv=("qkv_proj",),
        kv=("qkv_proj",),
        all_linear=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "mixtral": Architecture(
        lambda n: MixtralConfig(num_local_experts=4, num_hidden_layers=n, **_COMMON), all_linear=_ATTENTION
    ),
    "gpt_oss": Architecture(
        lambda n: GptOssConfig(
            num_local_experts=4, layer_types=_windowed_layers(n), **_WINDOWED, num_hidden_layers=n, **_COMMON
        ),
        all_linear=_ATTENTION,
    ),
}
KINDS = tuple(ARCHITECTURES)
