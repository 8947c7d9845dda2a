"""Mixture-of-experts layers that compute every token by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def row_wise_experts(model: Any) -> Iterator[None]:
    """Makes transformers' expert layers gather the weights of each token's experts for as long as it lasts.

    By default they loop over the experts that were hit. A loop can't be exported, and its products have as many rows as
    tokens chose the expert, so that other tokens change how a token is rounded.
    """
    config = model.config.get_text_config()
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = before
