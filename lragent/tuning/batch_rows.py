"""From examples to the rows of a forward and the weights of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lragent.training.rows import Rows
from lragent.training.scored_rows import scored_rows
from lragent.tuning.examples import Example


def rows_of_examples(scheme: str, examples: Sequence[Example], agents: Sequence[str]) -> Rows:
    """Rows under a scheme; the entries named `_R` are those of the tokens in the loss, in order."""
    sequences = [example.sequence for example in examples]
    return scored_rows(scheme, sequences, [example.scored for example in examples], agents)


def per_token(examples: Sequence[Example], values: Sequence[float]) -> Tensor:
    """A value of each example, repeated for each of its tokens in the loss: float32 `[R]`."""
    counts = torch.tensor([example.scored_tokens for example in examples])
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)
