"""Private APIs of transformers. Seen in transformers 5.0 to 5.24."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lragent.errors import InternalError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attention_can_be_set(model: Any) -> bool:
    """True if the model's class computes attention through transformers' attention interface.

    Private API: `PreTrainedModel._can_set_attn_implementation`, seen in transformers 5.0 to 5.24.
    """
    return bool(model._can_set_attn_implementation())


@contextmanager
def attention_set(model: Any, name: str, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Registers an attention function under `name` and makes the model use it, inside the context.

    Private API: `PretrainedConfig._attn_implementation`, `AttentionInterface._global_mapping`, seen in transformers 5.0
    to 5.24.
    """
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, function)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)


@contextmanager
def mask_registered(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Registers a function that makes the masks of the attention function `name`, inside the context.

    Private API: `AttentionMaskInterface._global_mapping`, seen in transformers 5.0 to 5.24.
    """
    from transformers.masking_utils import AttentionMaskInterface

    AttentionMaskInterface.register(name, function)
    try:
        yield
    finally:
        AttentionMaskInterface._global_mapping.pop(name, None)


@dataclass(frozen=True)
class MaskRequest:
    """Keywords with which transformers calls a function that makes masks.

    Args:
        function: transformers' function of batch, head, query and key index; True where the query sees the key.
        queries: number of queries.
        keys: number of keys.
    """

    function: MaskFunction
    queries: int
    keys: int


def mask_request(given: dict[str, Any]) -> MaskRequest:
    """Reads the keywords that transformers passes to a function that makes masks.

    Private API: the keywords `mask_function`, `kv_length` and, in transformers 5.0, `cache_position`; since then
    `q_length`, seen up to 5.24.

    Raises:
        InternalError: the keywords are unknown.
    """
    known = {"kv_length", "mask_function"} <= given.keys()
    if known and "q_length" in given:
        queries = int(given["q_length"])
    elif known and "cache_position" in given:
        queries = int(given["cache_position"].shape[0])
    else:
        raise InternalError(f"transformers makes masks with unknown keywords: {', '.join(sorted(given))}")
    return MaskRequest(given["mask_function"], queries, int(given["kv_length"]))


@contextmanager
def gathered_experts(config: Any) -> Iterator[None]:
    """Makes expert layers gather the weights of each token's experts, inside the context.

    A config without expert layers is left as it is.

    Private API: `PretrainedConfig._experts_implementation` and its value "batched_mm", seen in transformers 5.0 to
    5.24.
    """
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = before


def forward_with_steady_frequencies(forward: Any) -> Any:
    """The forward inside the decorator that chooses rotary frequencies by length; None if it is not decorated.

    Private API: the inner function of `transformers.modeling_rope_utils.dynamic_rope_update`, recognized by its code,
    seen in transformers 5.0 to 5.24.
    """
    from transformers.modeling_rope_utils import dynamic_rope_update

    decorator = dynamic_rope_update(lambda module, x, position_ids: None).__code__
    while forward is not None:
        inner = getattr(forward, "__wrapped__", None)
        if getattr(forward, "__code__", None) is decorator:
            return inner
        forward = inner
    return None


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D`: a linear layer with weight `[in, out]`.

    Private API: `transformers.pytorch_utils.Conv1D.nf`, seen in transformers 5.0 to 5.24.
    """
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "nf")


def embedding_scale(module: nn.Module) -> float:
    """Factor that an embedding applies to its rows; 1 for other modules.

    Private API: `embed_scale` of transformers' scaled embeddings, seen in transformers 5.0 to 5.24.
    """
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale) if isinstance(module, nn.Embedding) else 1.0


def key_conversion(model: Any) -> Callable[[str], tuple[str, bool]]:
    """Returns the rule by which transformers reads keys of the model's older checkpoints.

    The rule takes a key and gives its name in the model, and True if the tensor is joined with others into one
    parameter, as those of experts are. A key that needs no rule is given back.

    Private API: `transformers.conversion_mapping.get_model_conversion_mapping`, and `rename_source_key`,
    `WeightConverter` and `WeightRenaming` of `transformers.core_model_loading`, seen in transformers 5.0 to 5.24.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def convert(key: str) -> tuple[str, bool]:
        name, joining = rename_source_key(key, renamings, converters)
        return name, joining is not None

    return convert
