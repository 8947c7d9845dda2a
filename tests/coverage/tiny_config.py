"""A small config of any model type: sizes are reduced through the attributes that the type's own config has.

Lists with one entry a layer keep one layer of each kind, so that a type's layers all appear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from tests.coverage.config_overrides import OVERRIDES

VOCAB = 128
HEAD_DIM = 16
POSITIONS = 256
FEWEST_LAYERS = 2
MOST_LAYERS = 8

# Small enough that the compared text is longer: a window that never ends is not tested.
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "local_attention",
    "local_attention_window_len",
    "keep_window_size",
)
# Value -> attributes that take it, if a config has them and they are set.
SIZES: dict[int, tuple[str, ...]] = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input", "attention_hidden_size", "encoder_hash_byte_group_vocab"),
    64: (
        "attention_chunk_size",
        "hidden_size",
        "hidden_size_global",
        "d_model",
        "n_embd",
        "n_embed",
        "dim",
        "emb_dim",
        "word_embed_proj_dim",
        "embedding_size",
        "embed_dim",
        "dim_model",
        "lru_width",
        "input_embedding_size",
        "output_embedding_size",
        "rotary_emb_base_dim",
    ),
    96: (
        "intermediate_size",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "d_inner",
        "dff",
        "dim_ff",
        "n_inner",
        "ffn_hidden_size",
        "shared_intermediate_size",
        "feed_forward_size",
        "ffn_dim_decoder",
        "intermediate_size_mlp",
        "block_ff_dim",
        "dense_intermediate_size",
    ),
    32: (
        "attention_head_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    POSITIONS: ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx"),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "swa_num_attention_heads",
        "index_n_heads",
        "indexer_n_heads",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "n_groups",
    ),
    2: (
        "num_key_value_heads",
        "num_experts_per_tok",
        "moe_k",
        "moe_topk",
        "top_k_experts",
        "swa_num_key_value_heads",
        "indexer_kv_heads",
        "num_decoder_attention_heads",
        "num_encoder_attention_heads",
    ),
    8: ("rotary_dim", *WINDOWS),
    1: ("n_group", "topk_group", "n_shared_experts", "num_shared_experts"),
    HEAD_DIM: (
        "head_dim",
        "kv_channels",
        "qk_rope_head_dim",
        "v_head_dim",
        "global_head_dim",
        "swa_head_dim",
        "swa_v_head_dim",
        "hidden_size_per_layer_input",
        "dim_head",
        "index_head_dim",
        "indexer_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
    ),
    24: ("qk_nope_head_dim",),
    40: ("qk_head_dim",),
    20: ("kv_lora_rank",),
    28: ("q_lora_rank",),
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
          "num_decoder_layers", "num_encoder_layers")  # fmt: skip
QUERY_HEADS = {"num_key_value_heads": "num_attention_heads", "swa_num_key_value_heads": "swa_num_attention_heads"}
# What a type's own default leaves out although its model can't be built without it.
FILLED: dict[str, Any] = {"default_language": "en_XX", "layer_types": ["conv", "full_attention"]}


def tiny_config(kind: type[PretrainedConfig], fill: bool = False, of_each: int = 1) -> PretrainedConfig:
    """A config of this class, small wherever its attributes allow.

    Args:
        fill: also set sizes that are None by default.
        of_each: layers of each kind.
    """
    given = OVERRIDES.get(kind.model_type, {})
    try:
        default = kind()
    except Exception:  # its own defaults don't fit each other
        default = kind(**given)
    return kind(**_smaller(default, fill, of_each, given))


def _smaller(default: PretrainedConfig, fill: bool, of_each: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments that make a config of the same class small; `given` ones as they are."""
    held = {**default.to_dict()}
    for other, name in getattr(default, "attribute_map", {}).items():
        held.setdefault(other, held.get(name))
    arguments: dict[str, Any] = {}
    for name, value in list(vars(default).items()):
        if isinstance(value, PretrainedConfig):
            arguments[name] = type(value)(**_smaller(value, fill, of_each, given.get(name, {})))
    own = {name: value for name, value in given.items() if name not in arguments}
    arguments.update(_sizes(held, fill))
    if fill:
        arguments.update({name: value for name, value in FILLED.items() if name in held and held[name] is None})
    if "conv_L_cache" in held and set(held["layer_types"] or ()) <= {"full_attention"}:
        arguments["layer_types"] = FILLED["layer_types"]  # what published models of such a type have
    if held.get("rope_parameters") == {} and held.get("layer_types"):
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        arguments["rope_parameters"] = {kind: plain for kind in held["layer_types"]}
    return {**_fewer_layers(held, arguments, of_each), **arguments, **own}


def _sizes(held: dict[str, Any], fill: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size, names in SIZES.items():
        for name in names:
            value = held.get(name, 0)
            if (value is None and fill) or (isinstance(value, int) and not isinstance(value, bool) and value > size):
                found[name] = size
    for name, heads in QUERY_HEADS.items():
        if name in found and held.get(name) is not None and held[name] == held.get(heads):
            found[name] = found[heads]
    if "expand" in held and "num_heads" in found:
        found["head_dim"] = found["hidden_size"] * held["expand"] // found["num_heads"]
    return found


def _fewer_layers(held: dict[str, Any], sizes: dict[str, Any], of_each: int) -> dict[str, Any]:
    layers = max((held[name] for name in LAYERS if isinstance(held.get(name), int)), default=0)
    if layers <= FEWEST_LAYERS:
        return {}
    by_layer = {
        name: value
        for name, value in held.items()
        if isinstance(value, list) and len(value) == layers and not _are_indices(value)
    }
    own = {int(i): values for i, values in (held.get("per_layer_config") or {}).items()}
    sharing = held.get("num_kv_shared_layers") or 0
    kinds = [
        (*(str(values[i]) for values in by_layer.values()), str(own.get(i)), i >= layers - sharing)
        for i in range(layers)
    ]
    kept = _some_of_each(kinds, of_each)
    fewer: dict[str, Any] = {name: len(kept) for name in LAYERS if isinstance(held.get(name), int)}
    fewer.update({name: [_small(value[i], 96) for i in kept] for name, value in by_layer.items()})
    if own:
        fewer["per_layer_config"] = {
            str(new): {n: sizes[n] * v // held[n] if n in sizes else v for n, v in own[old].items()}
            for new, old in enumerate(kept)
            if old in own
        }
    if sharing:
        fewer["num_kv_shared_layers"] = sum(i >= layers - sharing for i in kept)
    return fewer


def _are_indices(values: list[Any]) -> bool:
    return all(isinstance(v, int) for v in values) and len(set(values)) == len(values)


def _small(value: Any, size: int) -> Any:
    return size if isinstance(value, int) and value > size else value


def _some_of_each(kinds: list[Any], of_each: int) -> list[int]:
    """Indices of layers so that every kind of layer is there."""
    chosen: list[int] = []
    for kind in dict.fromkeys(kinds):
        chosen += [i for i, other in enumerate(kinds) if other == kind][:of_each]
    chosen = sorted(chosen)[:MOST_LAYERS]
    more = [i for i in range(len(kinds)) if i not in chosen]
    return sorted([*chosen, *more[: max(0, FEWEST_LAYERS - len(chosen))]])
