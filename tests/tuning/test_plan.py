"""As many steps are planned as fit into the time, with all that they need."""

from __future__ import annotations

import pytest
import torch

from lragent.training.turn_sequence import Turn, TurnSequence
from lragent.tuning import plan
from lragent.tuning.batches import Batch
from lragent.tuning.examples import Example
from lragent.tuning.options import TuneOptions

CPU = torch.device("cpu")


def batch(index: int) -> Batch:
    one = Example(TurnSequence(tuple(range(100)), (Turn("plan", 6, 100),)), (True,), 1.0, 0.0, (), "")
    return Batch((index,), (one,), "")


@pytest.fixture(autouse=True)
def a_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "seconds_of", lambda work, device: 1.0)


def planned(batches: int, teacher: float, options: TuneOptions, report: float = 0.0, used: float = 0.0) -> plan.Plan:
    many = [batch(index) for index in range(batches)]
    return plan.plan_round(options, many, lambda batch: None, CPU, [teacher] * batches, report, used)


def test_all_steps_if_they_fit() -> None:
    found = planned(100, 0.0, TuneOptions(steps=100, minutes=10))
    assert found.steps == 100 and found.seconds_a_step == pytest.approx(1)


def test_the_teacher_of_many_trajectories_takes_of_the_time() -> None:
    options = TuneOptions(steps=500, minutes=10)
    alone = planned(500, 0.0, options)
    assert alone.steps == 500
    half = planned(500, 1.0, options)
    assert half.steps == int((600 * plan.MARGIN - 2) / 2)
    assert half.steps * (half.seconds_a_step + 1.0) <= 600


def test_evaluations_and_what_was_used_take_of_it_too() -> None:
    options = TuneOptions(steps=500, minutes=5, evaluations=8)
    found = planned(500, 0.0, options, report=10.0, used=50.0)
    assert found.steps == int(300 * plan.MARGIN - 50 - 2 - 10 - 9 * 10)
    assert planned(500, 0.0, options, used=1000.0).steps == 1
