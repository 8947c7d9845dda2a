"""Which mask every attention call gets, and up to which position that is what the call says of itself.

Attention is captured without masks: a call is causal, with the sliding window that it passes. transformers makes masks
apart from that, by functions of two positions, so each function is compared with its call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lragent.probing.attention_interface import ATTENTION_NAME, attention_as, own_value
from lragent.probing.bisection import largest

log = logging.getLogger(__name__)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Masks are compared up to this position: longer windows and chunks than that are not in use.
MOST_POSITIONS = 1 << 16
_TOKENS = 7


@dataclass(frozen=True)
class AttentionCall:
    """A call of attention: who called, the window that it passes (0: none), and its mask if transformers made it."""

    caller: str
    window: int
    mask: MaskFunction | None

    def is_as_told(self, positions: int) -> bool:
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
            return most <= _TOKENS or self.is_as_told(_TOKENS)
        return bool((seen == expected).all())


@contextmanager
def tokens_alone(model: Any) -> Iterator[list[AttentionCall]]:
    """While it lasts, every token sees itself only; calls of attention are collected."""
    from transformers.masking_utils import AttentionMaskInterface

    calls: list[AttentionCall] = []
    made: list[MaskFunction] = []

    def make_mask(*_: Any, q_length: int, kv_length: int, mask_function: MaskFunction, **__: Any) -> Tensor:
        made.append(mask_function)
        return torch.full((1, 1, q_length, kv_length), float(len(made) - 1))  # full of its number, to be known again

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
        calls.append(AttentionCall(type(module).__name__, int(sliding_window or 0), _known(attention_mask, made)))
        return own_value(query, key, value), None

    with attention_as(model, attend):
        AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
        try:
            yield calls
        finally:
            AttentionMaskInterface._global_mapping.pop(ATTENTION_NAME, None)


def mask_reach(model: Any, positions: int, offset: int) -> int:
    """How many of `positions` may be used before a mask is another one than its attention call says.

    All of them where it is another one from the start: then the model is refused, not cut short.
    """
    if not model._can_set_attn_implementation():
        return positions
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
    with tokens_alone(model) as calls:
        try:
            with torch.no_grad():
                model(input_ids=ids, position_ids=torch.arange(_TOKENS)[None] + offset, use_cache=False)
        except Exception as error:  # it wants more of attention: capture will say what
            log.debug("no masks seen: %s", error)
            return positions

    def as_told(count: int) -> bool:
        return all(call.is_as_told(count) for call in calls)

    if as_told(positions) or not as_told(min(_TOKENS, positions)):
        return positions
    return largest(as_told, _TOKENS, min(positions, MOST_POSITIONS))


def _known(mask: Tensor | None, made: list[MaskFunction]) -> MaskFunction | None:
    """The function behind the mask that a call was given; None if it is none of them."""
    if mask is None or not mask.is_floating_point() or mask.numel() == 0 or bool((mask != mask.reshape(-1)[0]).any()):
        return None
    number = float(mask.reshape(-1)[0])
    return made[int(number)] if number in range(len(made)) else None
