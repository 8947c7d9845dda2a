"""Custom ops of the project: schemas, fake kernels, CPU kernels; passes and runtime meet here by name.

Legend: T = packed tokens, Hq = query heads, H = KV heads, Dk / Dv = head dims, P = tokens a page, N = agents, K = input
features, r = largest rank of a projection, R = columns of `x @ A_cat.T`.

`attention_marker` stands for the model's attention in a captured graph. `routed_linears` is what `fuse_linears` makes
of projections with one input, where there is a kernel for it. `write_kv` and `write_lr` put streams into the
cache. `flash_lora_attention` reads the cache; its kernel here is the reference, which defines correctness, and
`lower_attention` replaces it by one of the implementations in `lragent.kernels.implementations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

from lragent.kernels.attention_call import attention_op
from lragent.kernels.define_op import define_op, schema_of, unpacked
from lragent.kernels.flash_lora_attention import reference as attention_reference
from lragent.kernels.routed_linear import reference as linear_reference
from lragent.kernels.write_cache import torch_scatter


@dataclass(frozen=True, eq=False)
class MarkedAttention:
    """Causal attention over the packed tokens of one sequence: `[1, T, Hq, Dv]`, in transformers' layout.

    Args:
        query_1HqTDk, key_1HTDk, value_1HTDv: after the model's own transforms.
        sinks_Hq, scale, window, softcap: see `lragent.kernels.attention_call.AttentionCall`.
        layer: index that the model gives its layer; -1: it gives none.
        slopes_Hq: `slope * position of the key` is added to each score (ALiBi).
    """

    query_1HqTDk: Tensor
    key_1HTDk: Tensor
    value_1HTDv: Tensor
    sinks_Hq: Tensor | None
    layer: int
    scale: float
    window: int
    softcap: float
    slopes_Hq: Tensor | None = None


def _marked_attention(marked: MarkedAttention) -> Tensor:
    """Runs plain attention, so that a captured graph can be executed and compared before it has a cache."""
    query_1HqTDk, key_1HTDk = marked.query_1HqTDk, marked.key_1HTDk
    if marked.slopes_Hq is not None:
        at_T = torch.arange(key_1HTDk.shape[2], device=key_1HTDk.device)
        query_1HqTDk, key_1HTDk = with_slopes(query_1HqTDk, key_1HTDk, marked.slopes_Hq, at_T, marked.scale)
    return attention_reference.causal_attention(
        query_1HqTDk, key_1HTDk, marked.value_1HTDv, marked.sinks_Hq, marked.scale, marked.window, marked.softcap
    ).contiguous()


def _marked_attention_fake(marked: MarkedAttention) -> Tensor:
    batch, heads, tokens, _ = marked.query_1HqTDk.shape
    return marked.query_1HqTDk.new_empty(batch, tokens, heads, marked.value_1HTDv.shape[3])


attention_marker = define_op(
    "attention_marker",
    schema_of(MarkedAttention),
    unpacked(MarkedAttention, _marked_attention),
    unpacked(MarkedAttention, _marked_attention_fake),
)


# A position is kept as two numbers below this, which 16-bit floats hold exactly.
SLOPE_STEP = 256
SLOPE_CHANNELS = 2


def with_slopes(
    query_1HqTD: Tensor, key_1HTD: Tensor, slopes_Hq: Tensor, positions_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys with two channels more, whose product adds `slope * position of the key` to a score."""
    heads, tokens = query_1HqTD.shape[1], query_1HqTD.shape[2]
    per_step_Hq2 = torch.stack([slopes_Hq * SLOPE_STEP, slopes_Hq], -1) / scale
    query_part = per_step_Hq2.to(query_1HqTD.dtype)[None, :, None].expand(1, heads, tokens, 2)
    digits_T2 = torch.stack([positions_T // SLOPE_STEP, positions_T % SLOPE_STEP], -1)
    key_part = digits_T2.to(key_1HTD.dtype)[None, None].expand(1, key_1HTD.shape[1], tokens, 2)
    return torch.cat([query_1HqTD, query_part], -1), torch.cat([key_1HTD, key_part], -1)


def _light_op(
    fake: Callable[..., object], mutated: tuple[str, ...] = ()
) -> Callable[[Callable[..., object]], OpOverload]:
    """Makes an op of a function, whose signature gives the schema and which is the kernel for any device."""

    def define(function: Callable[..., object]) -> OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=mutated)
        return define_op(function.__name__, schema, function, fake)

    return define


def _nothing(*args: object) -> None: ...


@_light_op(_nothing, mutated=("k_cache", "v_cache"))
def write_kv(key_THDk: Tensor, value_THDv: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
    """Writes base K and V of T tokens into the cache, cast to its dtype.

    Args:
        key_THDk, value_THDv: any strides.
        k_cache, v_cache: `[pages, H, P, Dk]`, `[pages, H, P, Dv]`, changed in place.
        slots_T: int64, `page * P + offset` of every token; a slot of page 0 is written and never read.

    Raises:
        IndexError: a slot lies outside the cache. On a GPU, which can't raise, its token is left out.
    """
    torch_scatter.write_kv(key_THDk, value_THDv, k_cache, v_cache, slots_T)


@_light_op(_nothing, mutated=("lr_cache",))
def write_lr(lr_TR: Tensor, lr_cache: Tensor, lr_table: Tensor, slots_NT: Tensor) -> None:
    """Writes LR columns of T tokens into the column blocks of every agent whose row of the table writes.

    Args:
        lr_TR: `x @ A_cat.T`; agent a's block takes its columns `[source, source + rank)`.
        lr_cache: flat, changed in place.
        lr_table: int64 `[N + 1, 4]`, a row (offset, rank, source, writes) for every agent id: see
            `lragent.program.cache_schema.LowRankStream.table`.
        slots_NT: int64, slot of every token in agent a's block, in row a - 1.

    Raises:
        IndexError: a slot lies outside the cache. On a GPU, which can't raise, its token is left out.
    """
    torch_scatter.write_lr(lr_TR, lr_cache, lr_table, slots_NT)


def _linears_fake(x: Tensor, agent_ids_T: Tensor, tensors: list[Tensor], bias_of: list[int], *_: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in tensors[: len(bias_of)]))


@_light_op(_linears_fake)
def routed_linears(
    x: Tensor,
    agent_ids_T: Tensor,
    tensors: list[Tensor],
    bias_of: list[int],
    up_of: list[int],
    down_of: list[int],
    routes: list[int],
) -> Tensor:
    """Projections of one input, side by side: `[..., T, features of all projections]` in the input's dtype.

    Projection i is `x @ tensors[i].T`, plus `tensors[bias_of[i]]`, plus the adapter of the token's agent: the agent's
    columns of `x @ tensors[down_of[i]].T` times the agent's rows of `tensors[up_of[i]]`. A down-projection that is one
    of the projections has its bias added and is computed for all agents; of any other, only the agent's own columns
    are computed.

    Args:
        x: `[..., T, K]`.
        agent_ids_T: int64, agent id of every token.
        tensors: weights `[features, K]` of the projections, then biases `[features]`, down-projections `[columns, K]`
            and up-projections `[ranks, features]`. One list, since AOTInductor can't pass an empty one.
        bias_of, up_of, down_of: an index into `tensors` for every projection; -1: it has none.
        routes: the last agent id, then three numbers for every projection with an up-projection and every agent id:
            first column of the down-projection, first row of the up-projection, rank.
    """
    return linear_reference.routed_linears(x, agent_ids_T, tensors, bias_of, up_of, down_of, routes)


flash_lora_attention = attention_op("flash_lora_attention", attention_reference.flash_lora_attention)
