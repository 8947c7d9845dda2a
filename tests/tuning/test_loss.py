"""The loss in chunks equals the loss of all rows at once, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lragent.tuning import loss
from lragent.tuning.loss import Scored, kl_and_cross_entropy, token_losses

ROWS, HIDDEN, VOCAB = 23, 8, 50


@pytest.mark.parametrize("with_teacher", [True, False])
def test_chunks_equal_the_whole(with_teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB).double()
    student = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(ROWS, HIDDEN, dtype=torch.float64) if with_teacher else None
    targets, agents = torch.randint(VOCAB, (ROWS,)), torch.zeros(ROWS, dtype=torch.int64)
    kl_weights, ce_weights = torch.rand(2, ROWS, dtype=torch.float64)
    largest = 0

    def logits(hidden: Tensor, agents: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(hidden))
        return head(hidden)

    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 4 * VOCAB)
    kl, cross_entropy = token_losses(logits, Scored(student, teacher, agents, targets), VOCAB)
    found = (kl * kl_weights + cross_entropy * ce_weights).sum()
    found_gradients = torch.autograd.grad(found, (student, head.weight))
    assert largest == 4

    logprobs = head(student).log_softmax(-1)
    expected = -(ce_weights * logprobs[torch.arange(ROWS), targets]).sum()
    if teacher is not None:
        p = head(teacher).softmax(-1).detach()
        expected = expected + (kl_weights * (p * (p.log() - logprobs)).sum(-1)).sum()
    torch.testing.assert_close(found, expected)
    for one, other in zip(found_gradients, torch.autograd.grad(expected, (student, head.weight)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_student_that_is_the_teacher_has_no_kl() -> None:
    head = nn.Linear(HIDDEN, VOCAB)
    states = torch.randn(ROWS, HIDDEN)
    scored = Scored(states, states, torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64))
    kl, cross_entropy = kl_and_cross_entropy(lambda hidden, agents: head(hidden), scored)
    assert kl.abs().max() < 1e-6 < cross_entropy.min()
