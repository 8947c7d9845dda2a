"""transformers' attention interface with a function of ours in it, for as long as a model is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ATTENTION_NAME = "lragent_marker"


@contextmanager
def attention_as(model: Any, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Sends the model's attention calls to `function` while it lasts, which are then given no mask."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, function)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)


def own_value(query_1HqTD: Tensor, key_1HTD: Tensor, value_1HTDv: Tensor) -> Tensor:
    """Stands for attention where each token sees itself only; what it gives still depends on all of query and key."""
    groups = query_1HqTD.shape[1] // value_1HTDv.shape[1]
    query_1HqT1, key_1HT1 = (
        torch.tanh((x @ torch.cos(torch.arange(x.shape[-1]) + 1.0).to(x.dtype))[..., None])
        for x in (query_1HqTD, key_1HTD)
    )
    key_1HqT1, value_1HqTDv = (x.repeat_interleave(groups, dim=1) for x in (key_1HT1, value_1HTDv))
    return (value_1HqTDv * (1 + query_1HqT1 / 4 + key_1HqT1 / 4)).transpose(1, 2).contiguous()
