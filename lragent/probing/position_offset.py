"""Runs a model at explicit positions, and finds its position offset.

Some models number positions from a constant above 0 (a learned table with reserved rows); others have no input for
positions. Packed steps pass the position of every token, so the offset must be known.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lragent.errors import LRAgentError, ModelError, shortened

POSITIONS = "position_ids"
# Offsets to try; learned tables reserve one or two rows for padding.
OFFSETS = range(8)
_TOKENS = 8


def takes_positions(model: Any) -> bool:
    """True if the model's forward has an input for positions, or accepts any keyword."""
    inputs = inspect.signature(model.forward).parameters
    return POSITIONS in inputs or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inputs.values())


def logits_at(model: Any, ids_1T: Tensor, positions_1T: Tensor | None) -> Tensor:
    """Runs one forward without a cache and returns logits `[1, T, vocab]`.

    Args:
        ids_1T: token ids `[1, T]`, int64.
        positions_1T: position ids `[1, T]`, passed if the model has an input for them; None: none are passed.
    """
    at = {POSITIONS: positions_1T} if positions_1T is not None and takes_positions(model) else {}
    logits: Tensor = model(input_ids=ids_1T, use_cache=False, **at).logits
    return logits


def require_logits_at(model: Any, ids_1T: Tensor, positions_1T: Tensor | None) -> Tensor:
    """`logits_at` without gradients.

    Raises:
        ModelError: the model does not run.
    """
    try:
        with torch.no_grad():
            return logits_at(model, ids_1T, positions_1T)
    except LRAgentError:
        raise
    except Exception as error:
        inputs = "token ids alone" if positions_1T is None else "token ids and positions"
        raise ModelError(
            f"{type(model).__name__} does not run on {inputs}: {shortened(error)}",
            "Check that the model and its adapters run in transformers and PEFT.",
        ) from error


def position_offset(model: Any, vocab_size: int) -> int:
    """Finds the constant that the model adds to positions 0, 1, 2, ... when none are passed.

    It is the offset at which explicit positions give the same logits, to the bit. Returns 0 if there is none in
    `OFFSETS`, or if the model has no input for positions.

    Raises:
        ModelError: the model does not run.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(_TOKENS + 1) if i != padding][:_TOKENS]]) % vocab_size
    expected = require_logits_at(model, ids, None)
    for offset in OFFSETS if takes_positions(model) else ():
        if torch.equal(require_logits_at(model, ids, torch.arange(_TOKENS)[None] + offset), expected):
            return offset
    return 0
