"""How a model counts positions: what it adds to 0, 1, 2, ... by itself, and where its graph counts without asking.

Some models start counting later than 0 (a learned table with rows kept free), others have no input for positions and
count rows. Packed tokens of many sequences need every position to come from the input.
"""

from __future__ import annotations

from typing import Any

import torch

from lragent.errors import ModelError

POSITIONS = "position_ids"
# Offsets that are tried; tables keep a row or two free for padding.
OFFSETS = range(8)
_TOKENS = 8


def position_offset(model: Any, vocab_size: int) -> int:
    """What must be added to positions 0, 1, 2, ... so that the model computes what it computes untold.

    Raises:
        ModelError: the model doesn't run.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(_TOKENS + 1) if i != padding][:_TOKENS]]) % vocab_size
    with torch.no_grad():
        try:
            untold = model(input_ids=ids, use_cache=False).logits
        except Exception as error:
            text = str(error).strip().splitlines()
            raise ModelError(
                f"{type(model).__name__} does not run on token ids alone: {text[0] if text else type(error).__name__}",
                "Check that the model and its adapters run in transformers and PEFT.",
            ) from error
        for offset in OFFSETS:
            positions = torch.arange(_TOKENS)[None] + offset
            try:
                told = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            except TypeError:  # it has no such input
                return 0
            if torch.equal(told, untold):
                return offset
    return 0
