"""The teacher: the distributions that agents have under `non_shared` before the first step.

Its last hidden states of the tokens in the loss are kept, not its logits: D numbers a token in place of V. An adapter
on the LM head is not trained, so that the head gives the teacher's logits at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lragent.errors import TaskFileError
from lragent.runtime.schemes import EXACT
from lragent.tuning.loss import token_losses
from lragent.tuning.material import Material

MOST_APART = 1.0  # nats, mean difference of recorded log-probabilities from the teacher's; rounding gives some 0.05
CHECKED = 8  # examples


def with_teacher(
    material: Material, indices: Sequence[int], batch_tokens: int, progress: Callable[[int], None] | None = None
) -> Material:
    """Adds the teacher's hidden states of examples, computed with the model as it is.

    Args:
        progress: called with the number of examples that are done.
    """
    states: dict[int, Tensor] = {}
    for picked in material.packed(indices, batch_tokens):
        some = [material.examples[index] for index in picked]
        with torch.no_grad():
            hidden_RD = material.hidden(material.rows(EXACT, some)).cpu()
        states.update(zip(picked, hidden_RD.split([len(example.generated) for example in some]), strict=True))
        if progress is not None:
            progress(len(states))
    return replace(material, teacher={**material.teacher, **states})


def require_own_tokens(material: Material) -> None:
    """Compares recorded log-probabilities of some examples with the teacher's.

    Raises:
        TaskFileError: they are far apart, so the tokens are those of another tokenizer or base model.
    """
    recorded = [index for index in material.teacher if material.examples[index].logprobs][:CHECKED]
    apart: list[float] = []
    for index in recorded:
        example = material.examples[index].without_appended()
        states_RD = material.teacher_of(index, example).to(material.device)
        scored = material.scored(material.rows(EXACT, [example]), states_RD, [index], [example])
        with torch.no_grad():
            _, cross_entropy_R = token_losses(material.model.logits, scored, material.vocab_size)
        recorded_R = torch.tensor(example.logprobs, dtype=torch.float64)
        apart += (cross_entropy_R.cpu().double() + recorded_R).abs().tolist()
    mean = sum(apart) / len(apart) if apart else 0.0
    if mean > MOST_APART:
        raise TaskFileError(
            f"{material.examples[recorded[0]].place}: recorded log-probabilities differ from those of these adapters "
            f"under non_shared by {mean:.1f} nats a token",
            "The trajectories are of another tokenizer or base model, or of agents that sharing led astray: roll tasks "
            "out with this model under non_shared.",
        )
