"""Which mask every attention call gets, and whether that is what the call says of itself.

Attention is captured without masks: a call is causal, with the sliding window that it passes. transformers makes masks
apart from that, by functions of two positions, so each function is compared with its call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Masks are compared up to this position: longer windows and chunks than that are not in use.
MOST_POSITIONS = 1 << 16


@contextmanager
def recorded_masks(name: str) -> Iterator[list[MaskFunction]]:
    """While it lasts, masks of the attention implementation `name` are full of their number in the list."""
    from transformers.masking_utils import AttentionMaskInterface

    seen: list[MaskFunction] = []

    def record(*args: Any, q_length: int, kv_length: int, mask_function: MaskFunction, **others: Any) -> Tensor:
        seen.append(mask_function)
        return torch.full((1, 1, q_length, kv_length), float(len(seen) - 1))

    AttentionMaskInterface.register(name, record)
    try:
        yield seen
    finally:
        AttentionMaskInterface._global_mapping.pop(name, None)


def mask_of_call(mask: Tensor | None, seen: list[MaskFunction]) -> MaskFunction | None:
    """The function behind the mask that a call was given; None if it is none of them."""
    if mask is None or not mask.is_floating_point() or mask.numel() == 0 or bool((mask != mask.reshape(-1)[0]).any()):
        return None
    number = float(mask.reshape(-1)[0])
    return seen[int(number)] if number in range(len(seen)) else None


def is_window(mask: MaskFunction, window: int, positions: int) -> bool:
    """Whether a mask is causal, with a sliding window if it is not 0."""
    most = min(positions, MOST_POSITIONS)
    rows = torch.tensor(sorted({i for i in (0, 1, 7, 100, most // 7, most // 3, most // 2, most - 1) if i < most}))
    rows_R1, columns_P, first = rows[:, None], torch.arange(most), torch.tensor(0)
    expected = columns_P <= rows_R1
    if window:
        expected = expected & (columns_P > rows_R1 - window)
    return bool((mask(first, first, rows_R1, columns_P) == expected).all())
