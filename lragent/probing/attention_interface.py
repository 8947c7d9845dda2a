"""Temporarily replaces the attention function of a transformers model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lragent.compat.transformers import attention_set

ATTENTION_NAME = "lragent_marker"


def attention_as(model: Any, function: Callable[..., tuple[Tensor, None]]) -> AbstractContextManager[None]:
    """Routes the model's attention calls to `function` inside the context.

    transformers passes no mask, unless a mask function is registered under `ATTENTION_NAME` too.

    Args:
        model: a transformers model.
        function: takes the arguments of transformers' attention interface and returns (output, None).
    """
    return attention_set(model, ATTENTION_NAME, function)


def own_value(query_1HqTD: Tensor, key_1HTD: Tensor, value_1HTDv: Tensor) -> Tensor:
    """Replaces attention by a function in which each token attends to itself only.

    The output depends on every element of query, key and value, so that a dependence on other tokens shows in it.

    Args:
        query_1HqTD: `[1, query heads, T, D]`.
        key_1HTD: `[1, KV heads, T, D]`.
        value_1HTDv: `[1, KV heads, T, Dv]`.

    Returns:
        `[1, T, query heads, Dv]`, as transformers' attention interface returns it.
    """
    groups = query_1HqTD.shape[1] // value_1HTDv.shape[1]
    query_1HqT1, key_1HT1 = (
        torch.tanh((x @ torch.cos(torch.arange(x.shape[-1]) + 1.0).to(x.dtype))[..., None])
        for x in (query_1HqTD, key_1HTD)
    )
    key_1HqT1, value_1HqTDv = (x.repeat_interleave(groups, dim=1) for x in (key_1HT1, value_1HTDv))
    return (value_1HqTDv * (1 + query_1HqT1 / 4 + key_1HqT1 / 4)).transpose(1, 2).contiguous()
