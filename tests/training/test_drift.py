"""Drift of sharing schemes: KL, agreement of the most likely token, and their groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lragent.artifact.directory import open_artifact
from lragent.errors import ModelError, RequestError
from lragent.program.drift import Tally
from lragent.training import token_figures
from lragent.training.drift import DISTANCES, NO_SWITCH, SHARED, bin_of, groups_of, measure_drift
from lragent.training.open_model import shared_model_of_artifact
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence

IDS = tuple((7 * i * i + 3 * i + 5) % 120 for i in range(60))
ALONE = TurnSequence(IDS[:20], (Turn("plan", 5, 20),))
MIXED = TurnSequence(IDS, (Turn("plan", 6, 20), Turn("action", 24, 40), Turn("plan", 40, 60)))


@pytest.fixture(scope="module")
def model(eager_artifact: Path) -> Iterator[SharedModel]:
    return shared_model_of_artifact(open_artifact(eager_artifact))


def test_nothing_drifts_before_another_agent_has_written(model: SharedModel) -> None:
    found = measure_drift(model, [ALONE], ("full_shared", "base_lr_shared", "base_shared"))
    assert (found.sequences, found.tokens) == (1, 15)
    for scheme in found.schemes:
        assert scheme.total.mean_kl < 1e-6 and scheme.total.agreement == 1.0


def test_drift_is_the_kl_of_whole_distributions(model: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one forward for each scheme, without chunks, in float64."""
    monkeypatch.setattr(token_figures, "ROWS", 7)
    found = measure_drift(model, [MIXED, ALONE], SHARED)
    assert [one.scheme for one in found.schemes] == list(SHARED)
    with torch.no_grad():
        teacher = model(rows_of("non_shared", [MIXED, ALONE], model.agents)).double().log_softmax(-1)
        for one in found.schemes:
            student = model(rows_of(one.scheme, [MIXED, ALONE], model.agents)).double().log_softmax(-1)
            expected = (teacher.exp() * (teacher - student)).sum(-1)
            assert one.total.kl == pytest.approx(float(expected.sum()), rel=1e-3, abs=1e-4), one.scheme
            same = int((teacher.argmax(-1) == student.argmax(-1)).sum())
            assert (one.total.tokens, one.total.same) == (len(expected), same)
            plan = [*range(14), *range(30, 50), *range(50, 65)]
            assert one.by_agent["plan"].kl == pytest.approx(float(expected[plan].sum()), rel=1e-3, abs=1e-4)
            assert one.by_agent["action"].tokens == 16
    assert max(one.total.mean_kl for one in found.schemes) > 0.01


def test_groups_add_up_in_order(model: SharedModel) -> None:
    (found,) = measure_drift(model, [MIXED, ALONE], ["full_shared"]).schemes
    for group in (found.by_agent, found.by_distance, found.by_context):
        assert sum(tally.tokens for tally in group.values()) == found.total.tokens
        assert sum(tally.kl for tally in group.values()) == pytest.approx(found.total.kl)
    assert list(found.by_agent) == ["plan", "action"]
    assert list(found.by_distance) == [NO_SWITCH, "0-15", "16-63"]
    assert list(found.by_context) == ["0-127"]


def test_distance_begins_at_the_end_of_another_agents_turn() -> None:
    sequence = TurnSequence(
        IDS,
        (Turn("plan", 1, 3), Turn("plan", 4, 5), Turn("action", 20, 22), Turn("action", 40, 41), Turn("base", 41, 42)),
    )
    found = [(group.agent, group.distance) for group in groups_of(sequence)]
    assert found == [
        *[("plan", NO_SWITCH)] * 3,
        ("action", "0-15"),  # 20 - 5
        ("action", "16-63"),
        ("action", "16-63"),  # 40 - 5: its own turn before is no switch
        ("base", "0-15"),
    ]


@pytest.mark.parametrize(
    ("value", "name"), [(0, "0-15"), (15, "0-15"), (16, "16-63"), (1023, "256-1023"), (1024, "1024+")]
)
def test_bins(value: int, name: str) -> None:
    assert bin_of(value, DISTANCES) == name


def test_an_empty_tally_is_no_loss() -> None:
    assert (Tally().mean_kl, Tally().agreement) == (0.0, 1.0)


def test_what_can_not_be_measured_is_refused(model: SharedModel) -> None:
    with pytest.raises(RequestError, match="on 0 trajectories"):
        measure_drift(model, [], SHARED)
    for schemes in ((), ("non_shared",)):
        with pytest.raises(RequestError, match="at least one scheme other than non_shared"):
            measure_drift(model, [ALONE], schemes)
    with pytest.raises(RequestError, match="'nobody'"):
        measure_drift(model, [TurnSequence(IDS, (Turn("nobody", 3, 5),))], SHARED)


def test_logits_that_are_no_numbers_are_an_error(model: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = model.logits
    monkeypatch.setattr(model, "logits", lambda *arguments: broken(*arguments) * float("nan"))
    with pytest.raises(ModelError, match="trajectory 1: logits under non_shared or full_shared are infinite or NaN"):
        measure_drift(model, [ALONE], ["full_shared"])
