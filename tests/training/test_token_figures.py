"""Figures of single tokens: the definition in float64, in chunks of any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lragent.training import token_figures as figures
from lragent.training.token_figures import kl_divergence, token_figures

ROWS, HIDDEN, VOCAB = 11, 8, 50


@pytest.mark.parametrize("rows", [1, 4, 11, 64])
def test_chunks_equal_the_definition(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB).double()
    teacher, near, far = (torch.randn(ROWS, HIDDEN, dtype=torch.float64) for _ in range(3))
    near = teacher + 0.1 * near
    agents, targets = torch.arange(ROWS) % 3, head(teacher).argmax(-1)
    targets[3] = (targets[3] + 1) % VOCAB
    seen: list[int] = []

    def logits(hidden: torch.Tensor, of_agents: torch.Tensor) -> torch.Tensor:
        seen.extend(of_agents.tolist())
        return head(hidden)

    monkeypatch.setattr(figures, "ROWS", rows)
    found = token_figures(logits, teacher, [near, far], agents, targets)
    assert sorted(seen) == sorted(agents.tolist() * 3)  # the teacher's logits are computed once
    p = head(teacher).softmax(-1)
    for one, student in zip(found, (near, far), strict=True):
        q = head(student).softmax(-1)
        torch.testing.assert_close(one.kl_R, (p * (p / q).log()).sum(-1))
        torch.testing.assert_close(one.cross_entropy_R, -q[torch.arange(ROWS), targets].log())
        assert torch.equal(one.same_R, p.argmax(-1) == q.argmax(-1))
        assert torch.equal(one.right_R, q.argmax(-1) == targets)
        assert not one.kl_R.requires_grad
    assert not found[1].same_R.all() and not torch.equal(found[0].same_R, found[0].right_R)


def test_ids_of_probability_0_count_nothing() -> None:
    masked = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert kl_divergence(masked, masked).tolist() == [0.0]
    other = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert kl_divergence(masked, other).item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert kl_divergence(other, masked).item() == torch.inf
