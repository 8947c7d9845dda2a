"""The arguments of attention over the cache, and the ops that take them.

Legend: T = packed query tokens, S = sequences, M = pages of the longest sequence, P = tokens per page, N = agents, Hq =
query heads, H = KV heads, Dk / Dv = head dims, r = largest rank of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from lragent.compat.torch import OpOverload
from lragent.kernels.define_op import define_op, schema_of, unpacked


# One is created per layer and step. A frozen dataclass takes 5 us, ten times as long.
@dataclass(eq=False)
class AttentionCall:
    """One attention of packed queries over paged base and LR streams (Flash-LoRA-Attention, arXiv 2602.01053).

    For a query of agent i (row i of the LR directories; agent 0 has rank 0) and token j of its sequence:
    `k_j = f(base_j + lr_k_j B_k[i])`, `out = sum_j p_j v_base_j + (sum_j p_j lr_v_j) B_v[i]`.
    An implementation returns `out`: `[T, Hq, Dv]` in the query's dtype.

    Args:
        query_THqDk: after the query's norm and rotation.
        k_cache, v_cache: `[pages, H, P, Dk]`, `[pages, H, P, Dv]`; the new tokens are already written.
        agent_ids_T: agent id of every query token; tokens of one sequence may differ.
        seq_starts: `[S + 1]`; context_lens_S, page_table_SM: see `lragent.program.step.StepInputs`.
        lr_k, lr_k_table, b_k: the LR stream of K (flat), its LR directory `[N + 1, 4]`, and lora_b per head
            `[N + 1, H, r, Dk]` with the scaling folded in and zero rows past an agent's rank; None if K has no
            adapter.
        lr_v, lr_v_table, b_v: the same for V.
        rope_cos, rope_sin: `[positions, Dk]`, rope_partner: int64 `[Dk]`: the rotation of a key at position p is
            `cos[p, d] * x[d] + sin[p, d] * x[partner[d]]` (signs are in `sin`); None: no rotation.
        norm_weight: weight of the RMSNorm of the key before the rotation, `[Dk]` per head or `[H, Dk]` over all heads
            together; None: no norm. norm_eps: its eps.
        key_is_final: if True, f is linear and `k_cache` holds `f(base)`; the LR part is rotated and added.
            If False, `k_cache` holds the raw base key and f is applied to the sum.
        sinks_Hq: one extra softmax logit per head, without a value; None: no sinks.
        scale: factor of the scores; window: number of keys visible to a query, its own included, 0 = all;
            softcap: `softcap * tanh(score / softcap)`, 0 = none.
    """

    query_THqDk: Tensor
    k_cache: Tensor
    v_cache: Tensor
    agent_ids_T: Tensor
    seq_starts: Tensor
    context_lens_S: Tensor
    page_table_SM: Tensor
    lr_k: Tensor | None
    lr_k_table: Tensor | None
    b_k: Tensor | None
    lr_v: Tensor | None
    lr_v_table: Tensor | None
    b_v: Tensor | None
    rope_cos: Tensor | None
    rope_sin: Tensor | None
    rope_partner: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    key_is_final: bool
    sinks_Hq: Tensor | None
    scale: float
    window: int
    softcap: float

    @property
    def k_low_rank(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`lr_k`, `lr_k_table` and `b_k`; None if K has no adapter."""
        return all_or_none(self.lr_k, self.lr_k_table, self.b_k)

    @property
    def v_low_rank(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`lr_v`, `lr_v_table` and `b_v`; None if V has no adapter."""
        return all_or_none(self.lr_v, self.lr_v_table, self.b_v)

    @property
    def rope(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`rope_cos`, `rope_sin` and `rope_partner`; None if keys are not rotated."""
        return all_or_none(self.rope_cos, self.rope_sin, self.rope_partner)

    def arguments(self) -> tuple[object, ...]:
        """All fields in the order in which the ops take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def empty_output(self) -> Tensor:
        """An uninitialized result: `[T, Hq, Dv]` in the query's dtype."""
        tokens, heads, _ = self.query_THqDk.shape
        return self.query_THqDk.new_empty(tokens, heads, self.v_cache.shape[3])


def all_or_none(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """The three tensors; None if one is missing."""
    return None if a is None or b is None or c is None else (a, b, c)


def attention_function(kernel: Callable[[AttentionCall], Tensor]) -> Callable[..., Tensor]:
    """Wraps an implementation as a function of the call's fields, which graph nodes can call."""
    return unpacked(AttentionCall, kernel)


def attention_op(name: str, kernel: Callable[[AttentionCall], Tensor] | None) -> OpOverload:
    """Defines `lragent::name`, which takes the fields of an `AttentionCall`.

    Args:
        kernel: runs on any device; None: a library registers kernels later (`lragent.kernels.cpp_library`).
    """
    function = None if kernel is None else attention_function(kernel)
    return define_op(name, schema_of(AttentionCall), function, attention_function(AttentionCall.empty_output))
