"""Makes mixture-of-experts layers compute each token independently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def row_wise_experts(model: Any) -> Iterator[None]:
    """Makes transformers' expert layers gather the weights of each token's experts, inside the context.

    By default they loop over the selected experts. Such a loop can't be exported. Its matrix products also have one row
    per token that selected the expert, so that other tokens change a token's rounding.
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
