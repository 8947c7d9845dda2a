"""Gradients of A and B: equal to PEFT's where both compute the same, and to finite differences under every scheme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lragent.training.rows import Rows
from lragent.training.schemes import SCHEME_ROWS, rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence
from tests.oracle.peft_oracle import load_peft
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, sequence_of


def loss_of(model: SharedModel, rows: Rows) -> Tensor:
    return torch.nn.functional.cross_entropy(model(rows), rows.targets_R)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_non_shared_has_the_gradients_of_peft(kind: str, shared_models: SharedModels) -> None:
    written, model = shared_models.get(kind)
    ids = list(range(3, 60, 3))
    sequence = TurnSequence(tuple(ids), (Turn("action", 10, len(ids)),))
    model.zero_grad()
    loss_of(model, rows_of("non_shared", [sequence], model.agents)).backward()
    peft = load_peft(written.model_dir, written.adapters, torch.float32)
    peft.set_adapter("action")
    logits = peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 9:-1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[10:])).backward()
    theirs = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    compared = 0
    for module in model.adapter_weights("action"):
        a, b = model.pairs[module]["action"]
        for ours, leaf in ((a, "lora_A"), (b, "lora_B")):
            (expected,) = (g for n, g in theirs.items() if f".{module}.{leaf}.action." in f".{n}")
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, expected, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared == len(theirs)


@pytest.mark.parametrize("scheme", SCHEME_ROWS)
def test_finite_differences(scheme: str, shared_models: SharedModels) -> None:
    _, model = shared_models.get("llama")
    rows = rows_of(scheme, [sequence_of(SCRIPT)], model.agents)
    model.zero_grad()
    loss_of(model, rows).backward()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    step = 1e-3
    losses = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
            losses.append(float(loss_of(model, rows)))
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05)


def test_checkpointing_changes_no_gradient(shared_models: SharedModels) -> None:
    _, model = shared_models.get("gemma3_text")
    rows = rows_of("base_lr_shared", [sequence_of(SCRIPT)], model.agents)
    found = []
    for model.checkpointing in (True, False):
        model.zero_grad()
        loss_of(model, rows).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.checkpointing = True
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_parameters_are_a_and_b_only(shared_models: SharedModels) -> None:
    _, model = shared_models.get("llama")
    weights = {id(p) for p in model.parameters()}
    expected = {id(p) for by_agent in model.pairs.values() for pair in by_agent.values() for p in pair}
    assert weights == expected
