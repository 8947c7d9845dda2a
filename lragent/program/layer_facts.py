"""Facts about one attention op of a rewritten program, for reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerFacts:
    """Facts about one attention op.

    Args:
        index: number of the attention op, in graph order.
        k_module, v_module: FQN of the projection whose LR stream K or V is computed from; None: no adapter.
        key_transform: description of the transform between key projection and attention.
    """

    index: int
    k_module: str | None
    v_module: str | None
    key_transform: str
