"""Makes mixture-of-experts layers compute each token independently."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lragent.compat.transformers import gathered_experts


def row_wise_experts(model: Any) -> AbstractContextManager[None]:
    """Makes transformers' expert layers gather the weights of each token's experts, inside the context.

    By default they loop over the selected experts. Such a loop can't be exported. Its matrix products also have one row
    per token that selected the expert, so that other tokens change a token's rounding.
    """
    return gathered_experts(model.config.get_text_config())
