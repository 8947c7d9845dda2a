"""Adapter-free rows that run on their own, before the others, change neither logits nor gradients."""

from __future__ import annotations

import pytest
import torch

from lragent.loading.model import load_live
from lragent.training.lower_to_rows import LayerStreams
from lragent.training.rows import Rows
from lragent.training.schemes import SCHEME_ROWS, rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence
from tests.coverage.tiny_model import adapted_model
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, sequence_of

AGENTS = ("plan", "action", "reflect")
SEQUENCE = sequence_of([step for step in SCRIPT if step[1] != "base"])


def ignore(streams: LayerStreams) -> None:
    """An observer."""


@pytest.mark.parametrize("scheme", ["neutral_shared", "rebase_shared"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_logits_and_gradients_are_those_of_all_rows_at_once(
    kind: str, scheme: str, shared_models: SharedModels
) -> None:
    _, model = shared_models.get(kind)
    assert_equal_at_once(model, rows_of(scheme, [SEQUENCE], model.agents))


@pytest.mark.parametrize("scheme", ["neutral_shared", "rebase_shared"])
@pytest.mark.parametrize("kind", ["deepseek_v3"])
def test_keys_of_two_projections(kind: str, scheme: str) -> None:
    model = SharedModel.of_model(load_live(adapted_model(kind)))
    turns = (Turn(model.agents[0], 6, 9), Turn(model.agents[1], 11, 14))
    sequence = TurnSequence(tuple(range(1, 15)), turns)
    assert_equal_at_once(model, rows_of(scheme, [sequence], model.agents))


@pytest.mark.parametrize("scheme", ["neutral_shared", "rebase_shared"])
def test_turns_that_are_not_scored(scheme: str, shared_models: SharedModels) -> None:
    _, model = shared_models.get("llama")
    scored = [number % 2 == 1 for number in range(len(SEQUENCE.turns))]
    rows = rows_of(scheme, [SEQUENCE], model.agents, [scored])
    assert 0 < len(rows.targets_R) < sum(turn.end - turn.start for turn in SEQUENCE.turns)
    assert_equal_at_once(model, rows)


def assert_equal_at_once(model: SharedModel, rows: Rows) -> None:
    """Compares hidden states and gradients with those of an observed forward, which runs all rows at once."""
    assert rows.parts is not None
    found = []
    for observe in (None, ignore):
        model.zero_grad()
        hidden = model.hidden(rows, observe)
        torch.nn.functional.cross_entropy(model.logits(hidden, rows.target_agents_R), rows.targets_R).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        found.append((hidden.detach(), *gradients))
    assert sum(float(gradient.abs().sum()) > 0 for gradient in found[0][1:]) > len(found[0]) / 2
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
