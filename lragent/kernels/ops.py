"""Custom ops of the project: schemas, fake kernels and reference kernels.

Legend: T = packed tokens, Hq = query heads, H = KV heads, Dk / Dv = head dims, P = tokens per page, N = agents, K =
input features, r = largest rank of a projection, R = width of the LR stream `x @ A_cat.T`.

- `attention_marker` stands for the model's attention in a captured graph.
- `routed_linears` fuses projections of one input and their adapters (`fuse_linears`).
- `write_kv` and `write_lr` write streams into the cache.
- `flash_lora_attention` reads the cache. Its kernel here is the reference, which defines correctness;
  `lower_attention` replaces the op by an implementation from `lragent.kernels.implementations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.compat.torch import OpOverload
from lragent.kernels.attention_call import attention_op
from lragent.kernels.define_op import define_op, schema_of, unpacked
from lragent.kernels.flash_lora_attention import reference as attention_reference
from lragent.kernels.routed_linear import reference as linear_reference
from lragent.kernels.write_cache import torch_scatter


@dataclass(frozen=True, eq=False)
class MarkedAttention:
    """Causal attention over the packed tokens of one sequence: `[1, T, Hq, Dv]`, in transformers' layout.

    Args:
        query_1HqTDk, key_1HTDk, value_1HTDv: after the model's norm and rotation.
        sinks_Hq, scale, window, softcap: see `lragent.kernels.attention_call.AttentionCall`.
        layer: the layer index that the model passes; -1 if it passes none.
        slopes_Hq: ALiBi slopes; `slope * key position` is added to each score. None: no ALiBi.
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
    """Runs plain attention, so that a captured graph can be executed and compared before it reads a cache."""
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


# A position is stored as two numbers below this bound, so that 16-bit floats represent both exactly.
SLOPE_STEP = 256
SLOPE_CHANNELS = 2


def with_slopes(
    query_1HqTD: Tensor, key_1HTD: Tensor, slopes_Hq: Tensor, positions_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Appends two channels to queries and keys; their product adds `slope * key position` to each score (ALiBi)."""
    heads, tokens = query_1HqTD.shape[1], query_1HqTD.shape[2]
    slopes_Hq2 = torch.stack([slopes_Hq * SLOPE_STEP, slopes_Hq], -1) / scale
    query_part = slopes_Hq2.to(query_1HqTD.dtype)[None, :, None].expand(1, heads, tokens, 2)
    digits_T2 = torch.stack([positions_T // SLOPE_STEP, positions_T % SLOPE_STEP], -1)
    key_part = digits_T2.to(key_1HTD.dtype)[None, None].expand(1, key_1HTD.shape[1], tokens, 2)
    return torch.cat([query_1HqTD, query_part], -1), torch.cat([key_1HTD, key_part], -1)


def _light_op(
    fake: Callable[..., object], mutated: tuple[str, ...] = ()
) -> Callable[[Callable[..., object]], OpOverload]:
    """Defines an op from a function: its signature is the schema, and it is the kernel for any device."""

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
        k_cache, v_cache: `[pages, H, P, Dk]`, `[pages, H, P, Dv]`; modified in place.
        slots_T: int64, `page * P + offset` of every token. Slots of page 0 (scratch) are written but never read.

    Raises:
        IndexError: a slot is outside the cache. A GPU can't raise and skips the token.
    """
    torch_scatter.write_kv(key_THDk, value_THDv, k_cache, v_cache, slots_T)


@_light_op(_nothing, mutated=("lr_cache",))
def write_lr(lr_TR: Tensor, lr_cache: Tensor, lr_table: Tensor, slots_NT: Tensor) -> None:
    """Writes the LR stream of T tokens into the LR block of every agent whose `writes` flag is set.

    Args:
        lr_TR: `x @ A_cat.T`; an agent's block receives `lr_TR[:, source : source + rank]`.
        lr_cache: flat; modified in place.
        lr_table: the LR directory, int64 `[N + 1, 4]`, one row (offset, rank, source, writes) per agent id; see
            `lragent.program.cache_schema.LowRankStream.table`.
        slots_NT: int64; row a - 1 holds the slot of every token in the LR block of agent a.

    Raises:
        IndexError: a slot is outside the cache. A GPU can't raise and skips the token.
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
    """Concatenated projections of one input: `[..., T, features of all projections]` in the input's dtype.

    Projection i is `x @ tensors[i].T + tensors[bias_of[i]]` plus the delta of the token's agent. The delta is the
    agent's part of `x @ tensors[down_of[i]].T` times the agent's rows of `tensors[up_of[i]]`. A down-projection that is
    itself one of the projections is part of the output: it is computed for all agents, with its bias. Any other
    down-projection is private, and only the part of the token's agent is needed.

    Args:
        x: `[..., T, K]`.
        agent_ids_T: int64, agent id of every token.
        tensors: weights `[features, K]` of the projections, then biases `[features]`, down-projections `[R, K]` and
            up-projections `[ranks, features]`. They share one list because AOTInductor can't pass an empty list.
        bias_of, up_of, down_of: index into `tensors` per projection; -1 if it has none.
        routes: the last agent id, then three numbers per adapted projection and agent id: the first row of the
            down-projection, the first row of the up-projection, and the rank.
    """
    return linear_reference.routed_linears(x, agent_ids_T, tensors, bias_of, up_of, down_of, routes)


flash_lora_attention = attention_op("flash_lora_attention", attention_reference.flash_lora_attention)
