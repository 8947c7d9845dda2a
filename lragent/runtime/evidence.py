"""The reason to trust an engine's sharing scheme, and the model with which a run can check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lragent.program.defaults import MAX_KL

Reason = Literal["exact", "tuned", "measured", "none"]


@dataclass(frozen=True)
class Evidence:
    """The reason to trust a sharing scheme.

    Args:
        reason: "exact": the scheme is `non_shared`; "tuned": the adapters were tuned for the scheme; "measured": its
            drift was measured and is small; "none": nothing is known.
        max_kl: largest drift that counts as no loss, in nats per token.
        open_model: opens the same model as a `lragent.training.SharedModel`, for rescoring; None: there is none.
    """

    reason: Reason = "none"
    max_kl: float = MAX_KL
    open_model: Callable[[], Any] | None = None
