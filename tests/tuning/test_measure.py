"""A tuning report and a drift report measure the same."""

from __future__ import annotations

import pytest
import torch

from lragent.loading.model import load_directories
from lragent.training.drift import measure_drift
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence
from lragent.tuning.examples import Example
from lragent.tuning.material import Material
from lragent.tuning.measure import measure, overall, sums_by_example
from lragent.tuning.teacher import with_teacher
from tests.tuning.conftest import RolledOut

SCHEME = "base_lr_shared"


def example(seed: int, *turns: Turn) -> Example:
    ids = tuple((seed * i * i + 7 * i) % 120 for i in range(turns[-1].end))
    return Example(TurnSequence(ids, turns), (True,) * len(turns), 1.0, 0.0, (), "", appended_kl=0.1)


def test_before_the_first_step_the_report_is_the_drift(rolled_out_qv: RolledOut) -> None:
    """The teacher is then the same: the agents as given, under `non_shared`."""
    loaded = load_directories(rolled_out_qv.model_dir, rolled_out_qv.adapters)
    examples = (
        example(3, Turn("plan", 5, 20), Turn("action", 24, 30), Turn("reflect", 30, 50), Turn("plan", 52, 60)),
        example(8, Turn("reflect", 9, 12), Turn("action", 20, 41)),
    )
    model = SharedModel.of_model(loaded)
    material = with_teacher(Material(model, loaded.vocab_size, examples, {}), (0, 1), 1000)
    found = measure(material, SCHEME, (0, 1), 1000)
    (drift,) = measure_drift(model, [one.sequence for one in examples], [SCHEME]).schemes
    assert set(found) == set(drift.by_agent) == {"plan", "action", "reflect"}
    for agent, tally in drift.by_agent.items():
        assert (found[agent].tokens, found[agent].top1) == (tally.tokens, pytest.approx(tally.agreement))
        assert found[agent].kl == pytest.approx(tally.mean_kl, rel=1e-3, abs=1e-6)
    assert overall(found).kl == pytest.approx(drift.total.mean_kl, rel=1e-3) and drift.total.mean_kl > 0.01
    sums = sums_by_example(material, SCHEME, (1, 0), 1000)
    alone = {index: overall(measure(material, SCHEME, (index,), 1000)) for index in (1, 0)}
    assert list(sums) == [1, 0] and [one.tokens for one in sums.values()] == [alone[1].tokens, alone[0].tokens]
    for index, one in sums.items():
        assert one.kl / one.tokens == pytest.approx(alone[index].kl, rel=1e-4)
        assert one.cross_entropy / one.tokens == pytest.approx(alone[index].cross_entropy, rel=1e-4)
    assert {agent: row.turns for agent, row in found.items()} == {"plan": 2, "action": 2, "reflect": 2}


def test_a_turn_is_right_if_all_of_its_tokens_are(rolled_out_qv: RolledOut) -> None:
    """Greedy tokens make a turn right; one other token does not."""
    loaded = load_directories(rolled_out_qv.model_dir, rolled_out_qv.adapters)
    model = SharedModel.of_model(loaded)
    ids = [5, 9, 44, 13]
    for _ in range(6):
        sequence = TurnSequence((*ids, 0), (Turn("plan", len(ids), len(ids) + 1),))
        with torch.no_grad():
            ids.append(int(model(rows_of("non_shared", [sequence], model.agents)).argmax()))
    right, wrong = tuple(ids), (*ids[:6], (ids[6] + 1) % 120, *ids[7:])
    turns = (Turn("plan", 4, 10),)
    examples = tuple(Example(TurnSequence(one, turns), (True,), 1.0, 0.0, (), "") for one in (right, wrong))
    material = with_teacher(Material(model, loaded.vocab_size, examples, {}), (0, 1), 1000)
    assert measure(material, "non_shared", (0,), 1000)["plan"].turn_accuracy == 1.0
    assert measure(material, "non_shared", (0, 1), 1000)["plan"].turn_accuracy == 0.5
