"""Adapter-free rows that run on their own, before the others, change neither logits nor gradients."""

from __future__ import annotations

import pytest
import torch

from lragent.training.lower_to_rows import LayerStreams
from lragent.training.schemes import SCHEME_ROWS, rows_of
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, sequence_of

AGENTS = ("plan", "action", "reflect")
SEQUENCE = sequence_of([step for step in SCRIPT if step[1] != "base"])


def ignore(streams: LayerStreams) -> None:
    """An observer; a forward that is observed runs all rows at once."""


@pytest.mark.parametrize("scheme", ["neutral_shared", "rebase_shared"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_logits_and_gradients_are_those_of_all_rows_at_once(
    kind: str, scheme: str, shared_models: SharedModels
) -> None:
    _, model = shared_models.get(kind)
    rows = rows_of(scheme, [SEQUENCE], model.agents)
    assert rows.parts is not None
    found = []
    for observe in (None, ignore):
        model.zero_grad()
        hidden = model.hidden(rows, observe)
        torch.nn.functional.cross_entropy(model.logits(hidden, rows.target_agents_R), rows.targets_R).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        found.append((hidden.detach(), *gradients))
    for apart, at_once in zip(*found, strict=True):
        torch.testing.assert_close(apart, at_once, rtol=1e-4, atol=1e-6)


def test_parts_hold_every_row_once() -> None:
    rows = rows_of("neutral_shared", [SEQUENCE], AGENTS)
    parts = rows.parts
    assert parts is not None
    assert len(parts.free.token_ids_N) + len(parts.others.token_ids_N) == len(rows.token_ids_N)
    assert not parts.free.agent_ids_N.any()
    assert parts.others.agent_ids_N.all()
    assert len(parts.free.targets_R) == 0
    torch.testing.assert_close(
        parts.others.token_ids_N[parts.others.logits_rows_R], rows.token_ids_N[rows.logits_rows_R]
    )


@pytest.mark.parametrize("scheme", [name for name in SCHEME_ROWS if name not in ("neutral_shared", "rebase_shared")])
def test_schemes_without_adapter_free_rows_stay_whole(scheme: str) -> None:
    assert rows_of(scheme, [SEQUENCE], AGENTS).parts is None


@pytest.mark.parametrize("scheme", SCHEME_ROWS)
def test_turns_of_the_base_model_keep_rows_whole(scheme: str) -> None:
    assert rows_of(scheme, [sequence_of(SCRIPT)], AGENTS).parts is None
