"""Which mask every attention call gets, and up to which position that is what the call says of itself.

Attention is captured without masks: a call is causal, with the sliding window that it passes. transformers makes masks
apart from that, by functions of two positions, so each function is compared with its call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lragent.errors import InternalError, LRAgentError, ModelError, shortened
from lragent.probing.attention_interface import ATTENTION_NAME, attention_as, own_value
from lragent.probing.bisection import largest
from lragent.probing.position_offset import logits_at

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Masks are compared up to this position: longer windows and chunks than that are not in use.
MOST_POSITIONS = 1 << 16
_TOKENS = 7


@dataclass(frozen=True)
class ProbedCall:
    """A call of attention.

    Args:
        caller: the class of the module that called.
        window: the sliding window that the call passes, in tokens; 0: none.
        mask: the function behind the mask of the call; None if it has no mask, or one of its own.
        own_mask: the call has a mask that is not one of those that transformers made.
    """

    caller: str
    window: int
    mask: MaskFunction | None
    own_mask: bool = False

    def mask_is_as_declared(self, positions: int) -> bool:
        """Whether the mask is causal with that window, over some positions."""
        if self.mask is None:
            return True
        most = min(positions, MOST_POSITIONS)
        rows = torch.tensor(sorted({i for i in (0, 1, 7, 100, most // 7, most // 3, most // 2, most - 1) if i < most}))
        rows_R1, columns_P, first = rows[:, None], torch.arange(most), torch.tensor(0)
        expected = columns_P <= rows_R1
        if self.window:
            expected = expected & (columns_P > rows_R1 - self.window)
        try:
            seen = self.mask(first, first, rows_R1, columns_P)
        except IndexError:  # it looks something up by token: only the call's own can be compared
            return most <= _TOKENS or self.mask_is_as_declared(_TOKENS)
        return bool((seen == expected).all())


@dataclass(frozen=True)
class TokensAlone:
    """One forward in which every token attends to itself only.

    Args:
        calls: the calls of attention.
        logits_1TV: the model's answer; None if it failed.
        failure: the error of a model that fails with this attention; "" if it ran.
    """

    calls: list[ProbedCall]
    logits_1TV: Tensor | None
    failure: str


def run_tokens_alone(model: Any, ids_1T: Tensor, positions_1T: Tensor, masks: bool = True) -> TokensAlone:
    """Runs the model with every token attending to itself only.

    Any error of the model's own code is an answer: this attention does not fit the model, though its own does.

    Args:
        masks: masks are made, so that calls and masks can be compared; else the interface has none.

    Raises:
        ModelError: an attention call does not have one key per token.
        InternalError: transformers makes masks by other keywords than `make_mask` knows.
    """
    with tokens_alone(model, masks) as calls:
        try:
            with torch.no_grad():
                return TokensAlone(calls, logits_at(model, ids_1T, positions_1T), "")
        except LRAgentError:
            raise
        except Exception as error:
            return TokensAlone(calls, None, f"{type(error).__name__}: {shortened(error)}")


def make_mask(made: list[MaskFunction], **given: Any) -> Tensor:
    """Stands for transformers' functions that make masks, and keeps the function of positions behind each mask.

    Args:
        made: the mask functions up to now; the new one is appended.
        given: the keywords that transformers passes. The queries are counted by `q_length`, in 5.0 by the length of
            `cache_position`.

    Returns:
        A mask `[1, 1, Tq, Tk]`, float32, full of its function's index in `made`.

    Raises:
        InternalError: the keywords are others.
    """
    known = {"kv_length", "mask_function"} <= given.keys()
    if known and "q_length" in given:
        queries = int(given["q_length"])
    elif known and "cache_position" in given:
        queries = int(given["cache_position"].shape[0])
    else:
        raise InternalError(f"transformers makes masks by keywords that are not known: {', '.join(sorted(given))}")
    made.append(given["mask_function"])
    return torch.full((1, 1, queries, int(given["kv_length"])), float(len(made) - 1))


@contextmanager
def tokens_alone(model: Any, masks: bool = True) -> Iterator[list[ProbedCall]]:
    """While it lasts, every token attends to itself only; calls of attention are collected.

    Args:
        masks: masks are made, and each call's is recognized; else the interface has none, as during the export.
    """
    from transformers.masking_utils import AttentionMaskInterface

    calls: list[ProbedCall] = []
    made: list[MaskFunction] = []

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        sliding_window: int | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        caller = type(module).__name__
        if key.shape[2] != query.shape[2]:
            raise ModelError(
                f"attention of {caller} has {key.shape[2]} keys for {query.shape[2]} queries",
                "A KV cache holds one key per token, so it can't be converted.",
            )
        mask = _known(attention_mask, made)
        calls.append(ProbedCall(caller, int(sliding_window or 0), mask, attention_mask is not None and mask is None))
        return own_value(query, key, value), None

    with attention_as(model, attend):
        if masks:
            AttentionMaskInterface.register(ATTENTION_NAME, partial(make_mask, made))
        try:
            yield calls
        finally:
            AttentionMaskInterface._global_mapping.pop(ATTENTION_NAME, None)


def mask_limit(model: Any, positions: int, offset: int) -> int:
    """How many of `positions` may be used before a mask is another one than its attention call says.

    All of them where it is another one from the start: then the model is refused, not cut short. All of them, too, for
    a model that fails with another attention: it is captured with its masks in its graph, where they are checked.

    Raises:
        ModelError: an attention call does not have one key per token.
    """
    if not model._can_set_attn_implementation():
        return positions
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
    alone = run_tokens_alone(model, ids, torch.arange(_TOKENS)[None] + offset)
    if alone.failure:
        return positions

    def as_told(count: int) -> bool:
        return all(call.mask_is_as_declared(count) for call in alone.calls)

    if as_told(positions) or not as_told(min(_TOKENS, positions)):
        return positions
    return largest(as_told, _TOKENS, min(positions, MOST_POSITIONS))


def _known(mask: Tensor | None, made: list[MaskFunction]) -> MaskFunction | None:
    """The function behind the mask that a call was given; None if it is none of them."""
    if mask is None or not mask.is_floating_point() or mask.numel() == 0 or bool((mask != mask.reshape(-1)[0]).any()):
        return None
    number = float(mask.reshape(-1)[0])
    return made[int(number)] if number in range(len(made)) else None
