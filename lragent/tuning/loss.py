"""The losses of the wanted rows of a forward: KL to the teacher's distribution, and cross-entropy.

Legend: R = tokens in the loss, D = hidden size, V = vocabulary. `[R, V]` never exists whole: rows are taken in chunks,
whose logits are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lragent.errors import InternalError
from lragent.training.token_figures import Logits, kl_divergence

CHUNK_NUMBERS = 1 << 24  # logits of a chunk: 64 MiB in float32


@dataclass(frozen=True)
class Scored:
    """Tokens in the loss of a forward.

    Args:
        student_RD: last hidden states.
        teacher_RD: last hidden states of the same tokens under the teacher; None if nothing is compared with it.
        agents_R: agent ids.
        targets_R: token ids.
    """

    student_RD: Tensor
    teacher_RD: Tensor | None
    agents_R: Tensor
    targets_R: Tensor

    def __post_init__(self) -> None:
        counts = [len(rows) for rows in vars(self).values() if rows is not None]
        if len(set(counts)) > 1:
            raise InternalError(f"entries of a loss belong to different tokens: {counts}")

    def chunks(self, vocab_size: int) -> Iterator[Scored]:
        """The same tokens in chunks of at most `CHUNK_NUMBERS` logits."""
        size = max(1, CHUNK_NUMBERS // vocab_size)
        for at in range(0, self.targets_R.shape[0], size):
            part = slice(at, at + size)
            teacher = None if self.teacher_RD is None else self.teacher_RD[part]
            yield Scored(self.student_RD[part], teacher, self.agents_R[part], self.targets_R[part])


def kl_and_cross_entropy(logits: Logits, scored: Scored) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), zero without a teacher, and cross-entropy of each token: float32 `[R]`, in nats."""
    student_RV = logits(scored.student_RD, scored.agents_R).log_softmax(-1)
    cross_entropy_R = -student_RV.gather(1, scored.targets_R[:, None])[:, 0]
    if scored.teacher_RD is None:
        return torch.zeros_like(cross_entropy_R), cross_entropy_R
    with torch.no_grad():
        teacher_RV = logits(scored.teacher_RD, scored.agents_R).log_softmax(-1)
    return kl_divergence(teacher_RV, student_RV), cross_entropy_R


def token_losses(logits: Logits, scored: Scored, vocab_size: int) -> tuple[Tensor, Tensor]:
    """`kl_and_cross_entropy` chunk by chunk; gradients reach the hidden states and the parameters of `logits`."""
    parts = [
        checkpoint(partial(_of_chunk, logits, part), part.student_RD, use_reentrant=False)
        for part in scored.chunks(vocab_size)
    ]
    kl, cross_entropy = zip(*parts, strict=True)
    return torch.cat(kl), torch.cat(cross_entropy)


def _of_chunk(logits: Logits, part: Scored, student_RD: Tensor) -> tuple[Tensor, Tensor]:
    return kl_and_cross_entropy(logits, Scored(student_RD, part.teacher_RD, part.agents_R, part.targets_R))
