"""Custom ops of the project: schemas, fake kernels, CPU kernels; passes and runtime meet here by name.

Legend: T = packed tokens, Hq = query heads, H = KV heads, Dk / Dv = head dims, P = tokens a page, S = sequences,
M = most pages of a sequence, N = agents, r = largest rank of a projection, R = columns of `x @ A_cat.T`.

`attention_marker` stands for the model's attention in a captured graph. `routed_linears` is what `fuse_linears` makes
of projections with one input, where there is a kernel for it. `write_kv` and `write_lr` put streams into the
cache. `flash_lora_attention` reads the cache; its kernel here is the reference, which defines correctness, and
`lower_attention` replaces it by one of the implementations in `lragent.kernels.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import custom_op

from lragent.kernels.flash_lora_attention import reference as attention_reference
from lragent.kernels.flash_lora_attention import torch_paged
from lragent.kernels.routed_linear import reference as linear_reference
from lragent.kernels.write_cache import torch_scatter


@custom_op("lragent::attention_marker", mutates_args=())
def attention_marker(
    query_1HqTDk: Tensor,
    key_1HTDk: Tensor,
    value_1HTDv: Tensor,
    sinks_Hq: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    slopes_Hq: Tensor | None = None,
) -> Tensor:
    """Causal attention over the packed tokens of one sequence: `[1, T, Hq, Dv]`.

    Runs plain attention, so that a captured graph can be executed and compared before it has a cache.

    Args:
        slopes_Hq: `slope * position of the key` is added to each score (ALiBi).
    """
    if slopes_Hq is not None:
        at_T = torch.arange(key_1HTDk.shape[2], device=key_1HTDk.device)
        query_1HqTDk, key_1HTDk = with_slopes(query_1HqTDk, key_1HTDk, slopes_Hq, at_T, scale)
    return attention_reference.causal_attention(
        query_1HqTDk, key_1HTDk, value_1HTDv, sinks_Hq, scale, window, softcap
    ).contiguous()


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


@attention_marker.register_fake
def _(
    query_1HqTDk: Tensor,
    key_1HTDk: Tensor,
    value_1HTDv: Tensor,
    sinks_Hq: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    slopes_Hq: Tensor | None = None,
) -> Tensor:
    return query_1HqTDk.new_empty(
        query_1HqTDk.shape[0], query_1HqTDk.shape[2], query_1HqTDk.shape[1], value_1HTDv.shape[3]
    )


def _light_op(
    name: str, function: Callable[..., object], fake: Callable[..., object], mutated: tuple[str, ...] = ()
) -> OpOverload:
    """An op with a kernel for any device, and without a derivative.

    So it does without the layers that `custom_op` adds: they would take longer than the work of a decode step.
    """
    qualified = f"lragent::{name}"
    schema = torch.library.infer_schema(function, mutates_args=mutated)
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, fake)
    op: OpOverload = getattr(torch.ops.lragent, name).default
    return op


def _nothing(*args: object) -> None: ...


# Writes base K and V of T tokens into pages `[pages, H, P, D]` at `slots` (page * P + offset).
write_kv = _light_op("write_kv", torch_scatter.write_kv, _nothing, ("k_cache", "v_cache"))
# Writes LR columns of T tokens into the column blocks of a flat LR tensor (see `LowRankStream.table`): agent a's block
# takes columns `[source, source + rank)` of `lr_TR` at slot `slots_NT[a]`, if its row writes.
write_lr = _light_op("write_lr", torch_scatter.write_lr, _nothing, ("lr_cache",))


def _linears_fake(x: Tensor, agent_ids_T: Tensor, tensors: list[Tensor], bias_of: list[int], *_: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in tensors[: len(bias_of)]))


# Projections `[..., N]` of one input `[..., K]`, side by side. `tensors` starts with their weights `[features, K]`; the
# lists have an entry for each of them. Projection i is `x @ tensors[i].T`, plus `tensors[bias_of[i]]`, plus the adapter
# of the token's agent: its columns of `x @ tensors[down_of[i]].T` times its columns of `tensors[up_of[i]]`
# `[ranks, features]`; -1 means none. A down-projection that is one of the projections has its bias added and is there
# for all agents; of another one, own columns are all that is computed. `routes` holds the last agent id, then, for
# every projection with an up-projection and every agent id, the first column of the down-projection, the first one of
# the up-projection, and the rank. (One list of tensors, and the agents among the routes, since AOTInductor can't pass
# an empty list.)
routed_linears = _light_op("routed_linears", linear_reference.routed_linears, _linears_fake)


def _attention_fake(
    query_THqDk: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    agent_ids_T: Tensor,
    seq_starts: Tensor,
    context_lens_S: Tensor,
    page_table_SM: Tensor,
    lr_k: Tensor | None,
    lr_k_table: Tensor | None,
    b_k: Tensor | None,
    lr_v: Tensor | None,
    lr_v_table: Tensor | None,
    b_v: Tensor | None,
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    rope_partner: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    key_is_final: bool,
    sinks_Hq: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return query_THqDk.new_empty(query_THqDk.shape[0], query_THqDk.shape[1], v_cache.shape[3])


@custom_op("lragent::flash_lora_attention", mutates_args=())
def flash_lora_attention(
    query_THqDk: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    agent_ids_T: Tensor,
    seq_starts: Tensor,
    context_lens_S: Tensor,
    page_table_SM: Tensor,
    lr_k: Tensor | None,
    lr_k_table: Tensor | None,
    b_k: Tensor | None,
    lr_v: Tensor | None,
    lr_v_table: Tensor | None,
    b_v: Tensor | None,
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    rope_partner: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    key_is_final: bool,
    sinks_Hq: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention of packed queries over paged base and LR streams (Flash-LoRA-Attention, arXiv 2602.01053).

    For a query of agent i (row i of the tables; agent 0 has rank 0) and token j of its sequence:
    `k_j = f(base_j + a_k_j B_k[i])`, `out = sum_j p_j v_base_j + (sum_j p_j a_v_j) B_v[i]`.

    Args:
        query_THqDk: after the query's own transform.
        k_cache, v_cache: `[pages, H, P, Dk]`, `[pages, H, P, Dv]`; new tokens are already written.
        agent_ids_T: agent id of every query token; tokens of one sequence may differ.
        seq_starts: `[S + 1]`; context_lens_S, page_table_SM: see `lragent.program.step.StepInputs`.
        lr_k, lr_k_table, b_k: LR columns of K (flat), their table `[N + 1, 4]`, and per-head up-projections
            `[N + 1, H, r, Dk]` with scaling folded in, rows past an agent's rank zero; None if K has no adapter.
        lr_v, lr_v_table, b_v: the same for V.
        rope_cos, rope_sin: `[positions, Dk]`, rope_partner: int64 `[Dk]`: the rotation of a key at position p is
            `cos[p, d] * x[d] + sin[p, d] * x[partner[d]]` (signs are in `sin`); None: no rotation.
        norm_weight: `[Dk]`, RMSNorm of the key over its head dim before the rotation, or `[H, Dk]`, one RMSNorm over
            all heads; None: no norm. norm_eps: its eps.
        key_is_final: True: `k_cache` holds `f(base)` and f is linear, so the LR part is rotated and added.
            False: `k_cache` holds the raw base key and f is applied to the sum.
        sinks_Hq: one extra logit a head that takes part in the softmax and has no value.
        scale: factor of the scores; window: keys visible to a query, itself included, 0 = all;
            softcap: `softcap * tanh(score / softcap)`, 0 = none.

    Returns:
        `[T, Hq, Dv]` in the query's dtype.
    """
    return attention_reference.flash_lora_attention(
        query_THqDk,
        k_cache,
        v_cache,
        agent_ids_T,
        seq_starts,
        context_lens_S,
        page_table_SM,
        lr_k,
        lr_k_table,
        b_k,
        lr_v,
        lr_v_table,
        b_v,
        rope_cos,
        rope_sin,
        rope_partner,
        norm_weight,
        norm_eps,
        key_is_final,
        sinks_Hq,
        scale,
        window,
        softcap,
    )


flash_lora_attention.register_fake(_attention_fake)

flash_lora_attention_torch = custom_op(
    "lragent::flash_lora_attention_torch", torch_paged.flash_lora_attention, mutates_args=()
)
flash_lora_attention_torch.register_fake(_attention_fake)

# Kernels that are compiled: see `lragent.kernels.cpp_library` and `lragent.kernels.triton_library`.
CPP_ATTENTION = "lragent::flash_lora_attention_cpp"
TRITON_ATTENTION = "lragent::flash_lora_attention_triton"
for _name in (CPP_ATTENTION, TRITON_ATTENTION):
    torch.library.define(
        _name,
        torch.library.infer_schema(torch_paged.flash_lora_attention, mutates_args=()),
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.register_fake(_name, _attention_fake)
