"""How a model counts positions: what it adds to 0, 1, 2, ... by itself, and where its graph counts without asking.

Some models start counting later than 0 (a learned table with rows kept free), others have no input for positions and
count rows. Packed tokens of many sequences need every position to come from the input.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lragent.errors import LRAgentError, ModelError, shortened

POSITIONS = "position_ids"
# Offsets that are tried; tables keep a row or two free for padding.
OFFSETS = range(8)
_TOKENS = 8


def takes_positions(model: Any) -> bool:
    """Returns true if the model's forward declares an input for positions, or takes any keyword."""
    inputs = inspect.signature(model.forward).parameters
    return POSITIONS in inputs or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inputs.values())


def logits_at(model: Any, ids_1T: Tensor, positions_1T: Tensor | None) -> Tensor:
    """Logits `[1, T, vocab]` of one forward without a cache; positions are passed if there is an input for them."""
    at = {POSITIONS: positions_1T} if positions_1T is not None and takes_positions(model) else {}
    logits: Tensor = model(input_ids=ids_1T, use_cache=False, **at).logits
    return logits


def require_logits_at(model: Any, ids_1T: Tensor, positions_1T: Tensor | None) -> Tensor:
    """The same, without gradients.

    Raises:
        ModelError: the model doesn't run.
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
    """Finds the constant that must be added to positions 0, 1, 2, ... to get the logits that no positions give.

    It is 0 for a model without an input for positions.

    Raises:
        ModelError: the model doesn't run.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(_TOKENS + 1) if i != padding][:_TOKENS]]) % vocab_size
    untold = require_logits_at(model, ids, None)
    for offset in OFFSETS if takes_positions(model) else ():
        if torch.equal(require_logits_at(model, ids, torch.arange(_TOKENS)[None] + offset), untold):
            return offset
    return 0
