"""Compares two distributions of each generated token: a teacher's and a student's, on the same tokens.

Both sides read the same tokens (teacher forcing), so a figure says what differs in this token and nothing of what
follows from another one. Legend: R = generated tokens, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor, Tensor], Tensor]  # hidden states [R, D], agent ids [R] -> float32 logits [R, V]

ROWS = 64  # rows of logits [rows, V] held at a time, of the teacher and of one student


@dataclass(frozen=True)
class TokenFigures:
    """Figures of each token, `[R]`.

    Args:
        kl_R: KL(teacher || student), in nats.
        same_R: True where both have the same most likely token.
        cross_entropy_R: of the generated token under the student, in nats.
        right_R: True where the generated token is the student's most likely one.
    """

    kl_R: Tensor
    same_R: Tensor
    cross_entropy_R: Tensor
    right_R: Tensor


def token_figures(
    logits: Logits, teacher_RD: Tensor, students_RD: Sequence[Tensor], agents_R: Tensor, targets_R: Tensor
) -> list[TokenFigures]:
    """Compares each student with the teacher; no gradients. `[R, V]` never exists whole.

    Args:
        teacher_RD, students_RD: last hidden states.
        agents_R: agent ids; targets_R: ids of the generated tokens.
    """
    found: list[list[TokenFigures]] = [[] for _ in students_RD]
    with torch.no_grad():
        for at in range(0, len(agents_R), ROWS):
            part = slice(at, at + ROWS)
            teacher_RV = logits(teacher_RD[part], agents_R[part]).log_softmax(-1)
            for chunks, student_RD in zip(found, students_RD, strict=True):
                student_RV = logits(student_RD[part], agents_R[part]).log_softmax(-1)
                chunks.append(compared(teacher_RV, student_RV, targets_R[part]))
    return [_joined(chunks) for chunks in found]


def kl_divergence(teacher_RV: Tensor, student_RV: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, `[R]`, in nats. Ids of probability 0 in both count nothing."""
    parts_RV = teacher_RV.exp() * (teacher_RV - student_RV)
    return torch.where(teacher_RV == -torch.inf, 0.0, parts_RV).sum(-1)


def compared(teacher_RV: Tensor, student_RV: Tensor, targets_R: Tensor) -> TokenFigures:
    """Compares log-probabilities."""
    likely_R = student_RV.argmax(-1)
    return TokenFigures(
        kl_R=kl_divergence(teacher_RV, student_RV),
        same_R=likely_R == teacher_RV.argmax(-1),
        cross_entropy_R=-student_RV.gather(1, targets_R[:, None])[:, 0],
        right_R=likely_R == targets_R,
    )


def _joined(chunks: Sequence[TokenFigures]) -> TokenFigures:
    columns = zip(*(vars(chunk).values() for chunk in chunks), strict=True)
    return TokenFigures(*(torch.cat(column) for column in columns))
