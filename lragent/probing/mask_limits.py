"""Checks that each attention call's declared window equals its mask, and finds the position limit up to which it does.

Capture drops masks: it treats every call as causal, with the sliding window that the call declares. transformers builds
masks independently, from functions of two positions. Each mask function is compared with the declaration of its call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lragent.compat.transformers import MaskFunction, attention_can_be_set, mask_registered, mask_request
from lragent.errors import LRAgentError, ModelError, shortened
from lragent.probing.attention_interface import ATTENTION_NAME, attention_as, own_value
from lragent.probing.bisection import largest
from lragent.probing.position_offset import logits_at

# Masks are compared up to this many positions; no known model has a longer window or chunk.
MOST_POSITIONS = 1 << 16
_TOKENS = 7


@dataclass(frozen=True)
class ProbedCall:
    """An attention call recorded while probing a model.

    Args:
        caller: class name of the calling module.
        window: sliding window that the call declares, in tokens; 0: none.
        mask: transformers' function for the call's mask; None if the call has no mask or a private one.
        own_mask: True if the call's mask was not made by transformers, or was changed.
    """

    caller: str
    window: int
    mask: MaskFunction | None
    own_mask: bool = False

    def mask_is_as_declared(self, positions: int) -> bool:
        """True if the mask is causal with the declared window over the first `positions` positions (sampled rows)."""
        if self.mask is None:
            return True
        most = min(positions, MOST_POSITIONS)
        sampled = torch.tensor(
            sorted({i for i in (0, 1, 7, 100, most // 7, most // 3, most // 2, most - 1) if i < most})
        )
        queries_R1, keys_P, first = sampled[:, None], torch.arange(most), torch.tensor(0)
        expected = keys_P <= queries_R1
        if self.window:
            expected = expected & (keys_P > queries_R1 - self.window)
        try:
            seen = self.mask(first, first, queries_R1, keys_P)
        except IndexError:  # it indexes per-token data, which exists for the probed tokens only
            return most <= _TOKENS or self.mask_is_as_declared(_TOKENS)
        return bool((seen == expected).all())


@dataclass(frozen=True)
class TokensAlone:
    """One forward in which every token attends to itself only.

    Args:
        calls: the attention calls, in order.
        logits_1TV: logits `[1, T, vocab]`; None if the model failed.
        failure: error of a model that fails with this attention; "" if it ran.
    """

    calls: list[ProbedCall]
    logits_1TV: Tensor | None
    failure: str


def run_tokens_alone(model: Any, ids_1T: Tensor, positions_1T: Tensor, masks: bool = True) -> TokensAlone:
    """Runs the model with every token attending to itself only.

    Errors of the model's own code are returned as `failure`: the model does not run with this attention.

    Args:
        ids_1T: token ids `[1, T]`, int64.
        positions_1T: position ids `[1, T]`, int64.
        masks: True to make masks, so that they can be compared with the calls; False to pass none.

    Raises:
        ModelError: an attention call does not have one key per token.
        InternalError: transformers passes keywords that `make_mask` does not know.
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
    """Replaces transformers' mask functions: records the function of positions behind each mask.

    Args:
        made: the recorded mask functions; the new one is appended.
        given: keywords that transformers passes.

    Returns:
        A mask `[1, 1, Tq, Tk]`, float32, filled with the index of its function in `made`.

    Raises:
        InternalError: the keywords are unknown.
    """
    request = mask_request(given)
    made.append(request.function)
    return torch.full((1, 1, request.queries, request.keys), float(len(made) - 1))


@contextmanager
def tokens_alone(model: Any, masks: bool = True) -> Iterator[list[ProbedCall]]:
    """Makes every token attend to itself only, inside the context. Yields a list that collects the attention calls.

    Args:
        masks: True to make masks and recognize the mask of each call; False to pass none, as during export.

    Raises:
        ModelError: inside the context, if an attention call does not have one key per token.
    """
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
                "A KV cache stores one key per token, so the model can't be converted.",
            )
        mask = _function_of(attention_mask, made)
        calls.append(ProbedCall(caller, int(sliding_window or 0), mask, attention_mask is not None and mask is None))
        return own_value(query, key, value), None

    masking = mask_registered(ATTENTION_NAME, partial(make_mask, made)) if masks else nullcontext()
    with attention_as(model, attend), masking:
        yield calls


def mask_limit(model: Any, positions: int, offset: int) -> int:
    """Finds the largest number of positions up to which every mask equals the declaration of its attention call.

    Returns `positions`, no limit, in two other cases: if a mask differs from the start, because capture refuses such a
    model; and if the model does not run with another attention, because its masks are then captured and checked.

    Args:
        positions: number of positions of the model.
        offset: constant that the model adds to positions 0, 1, 2, ...

    Raises:
        ModelError: an attention call does not have one key per token.
        InternalError: transformers passes keywords that `make_mask` does not know.
    """
    if not attention_can_be_set(model):
        return positions
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
    alone = run_tokens_alone(model, ids, torch.arange(_TOKENS)[None] + offset)
    if alone.failure:
        return positions

    def as_declared(count: int) -> bool:
        return all(call.mask_is_as_declared(count) for call in alone.calls)

    if as_declared(positions) or not as_declared(min(_TOKENS, positions)):
        return positions
    return largest(as_declared, _TOKENS, min(positions, MOST_POSITIONS))


def _function_of(mask: Tensor | None, made: list[MaskFunction]) -> MaskFunction | None:
    """Returns the function of a mask that `make_mask` made; None for any other mask."""
    if mask is None or not mask.is_floating_point() or mask.numel() == 0 or bool((mask != mask.reshape(-1)[0]).any()):
        return None
    number = float(mask.reshape(-1)[0])
    return made[int(number)] if number in range(len(made)) else None
