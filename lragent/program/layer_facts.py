"""Facts about one attention op of a rewritten program, for reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerFacts:
    """The projections whose LR columns an attention op reads (None: no adapter), and its key transform in words.

    `index` counts attention ops in graph order.
    """

    index: int
    k_module: str | None
    v_module: str | None
    key_transform: str
