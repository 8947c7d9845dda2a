"""From examples to the rows of a forward and the weights of its tokens.

Legend: R = tokens in the loss, in the order of examples and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.training.rows import Rows
from lragent.training.schemes import rows_of
from lragent.tuning.examples import Example


def rows_of_examples(scheme: str, examples: Sequence[Example], agents: Sequence[str]) -> Rows:
    """Rows under a scheme; the entries named `_R` are those of the tokens in the loss."""
    sequences = [example.predicted for example in examples]
    return rows_of(scheme, sequences, agents, [example.scored for example in examples])


@dataclass(frozen=True)
class TokenWeights:
    """Weights of tokens, `[R]`.

    Args:
        kl_R, cross_entropy_R: of generated tokens; they are 0 for appended ones. The weights of an example count as a
            mean over the generated tokens of the batch.
        appended_kl_R: of appended tokens, 0 for generated ones; a mean over the appended tokens of the batch.
    """

    kl_R: Tensor
    cross_entropy_R: Tensor
    appended_kl_R: Tensor


def token_weights(examples: Sequence[Example], device: torch.device) -> TokenWeights:
    """Weights of a batch's tokens in the loss; float32."""
    masks = [torch.tensor(example.generated) for example in examples]
    generated_R = torch.cat(masks)
    counts = torch.tensor([len(mask) for mask in masks])

    def mean_of(values: Sequence[float], mask_R: Tensor) -> Tensor:
        spread_R = torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)
        return (spread_R * mask_R / mask_R.sum().clamp(min=1)).to(device)

    return TokenWeights(
        kl_R=mean_of([example.kl for example in examples], generated_R),
        cross_entropy_R=mean_of([example.cross_entropy for example in examples], generated_R),
        appended_kl_R=mean_of([example.kl * example.appended_kl for example in examples], ~generated_R),
    )
