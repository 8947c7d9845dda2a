"""Selective recompute: its ends are two schemes, between them it is what its definition says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lragent.errors import RequestError
from lragent.training.early_deviation import LAYER, own_forward
from lragent.training.refresh import most_recent, refreshed_rows
from lragent.training.schemes import rows_of
from lragent.training.turn_sequence import TurnSequence
from tests.oracle.refresh_by_hand import early_deviations, refresh_by_hand
from tests.oracle.sharing_oracle import run_script
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, differences, logprobs, sequence_of

SEQUENCE = sequence_of(SCRIPT)
NAMES = ("base", "plan", "action", "reflect")  # by agent id
SHARES = (0.3, 0.5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_the_ends_are_base_lr_shared_and_non_shared(kind: str, shared_models: SharedModels) -> None:
    written, model = shared_models.get(kind)
    for share, scheme in ((0.0, "base_lr_shared"), (1.0, "non_shared")):
        found = refreshed_rows(SEQUENCE, model.agents, share, most_recent)
        expected = rows_of(scheme, [SEQUENCE], model.agents)
        assert len(found.rows.token_ids_N) == len(expected.token_ids_N)
        assert found.recomputed == round(share * found.candidates)
        exact, single = (
            [turn.logprobs for turn in run_script(written.model_dir, written.adapters, scheme, SCRIPT, dtype)]
            for dtype in (torch.float64, torch.float32)
        )
        allowed = 4 * max(differences(single, exact))
        assert max(differences(logprobs(model, found.rows), exact)) <= allowed, scheme


@pytest.mark.parametrize("shared_a", [False, True])
def test_a_share_between_is_what_the_definition_says(shared_a: bool, shared_models: SharedModels) -> None:
    written, model = shared_models.get("llama", shared_a=shared_a)
    _, _, deviation = own_forward(model, SEQUENCE)
    ends = [logprobs(model, rows_of(scheme, [SEQUENCE], model.agents)) for scheme in ("base_lr_shared", "non_shared")]
    for score in (most_recent, deviation):
        for share in SHARES:

            def rule(agent: str, found: Sequence[int]) -> Sequence[int]:
                number = NAMES.index(agent)
                return sorted(found, key=lambda at: score(number, at))[len(found) - round(share * len(found)) :]  # noqa: B023

            found = logprobs(model, refreshed_rows(SEQUENCE, model.agents, share, score).rows)
            expected = refresh_by_hand(written.model_dir, written.adapters, SCRIPT, rule)
            assert max(differences(found, expected)) <= 1e-4
            assert all(max(differences(found, end)) > 1e-2 for end in ends)


def test_the_deviation_is_that_of_the_second_layer(shared_models: SharedModels) -> None:
    written, model = shared_models.get("llama")
    hidden_RD, rows, deviation = own_forward(model, SEQUENCE)
    with torch.no_grad():
        assert torch.equal(hidden_RD, model.hidden(rows_of("non_shared", [SEQUENCE], model.agents)))
    assert len(rows.targets_R) == len(hidden_RD)
    expected = early_deviations(written.model_dir, written.adapters, SCRIPT, LAYER)
    for number, name in enumerate(NAMES):
        own = deviation.by_agent[number]
        assert own == pytest.approx(expected[name][: len(own)], rel=1e-3, abs=1e-6), name
        assert max(own) > 0.1


def test_the_most_recent_tokens_are_recomputed(shared_models: SharedModels) -> None:
    _, model = shared_models.get("llama")
    # plan processes 0 to 14, then action 15 to 19, then plan the rest: action finds 15 tokens, plan 5.
    found = refreshed_rows(sequence_of(SCRIPT[:5]), model.agents, 0.5, most_recent)
    assert (found.candidates, found.recomputed) == (20, 10)
    rows = list(zip(found.rows.agent_ids_N.tolist(), found.rows.positions_N.tolist(), strict=True))
    assert rows[15:23] == [(2, position) for position in range(7, 15)]
    assert rows[28:30] == [(1, 18), (1, 19)]


def test_what_can_not_be_refreshed_is_refused(shared_models: SharedModels) -> None:
    _, model = shared_models.get("llama")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(RequestError, match="must be from 0 to 1"):
            refreshed_rows(SEQUENCE, model.agents, share, most_recent)
    with pytest.raises(RequestError, match="no turn"):
        refreshed_rows(TurnSequence((1, 2), ()), model.agents, 0.5, most_recent)
