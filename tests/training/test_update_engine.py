"""A trainer's weights go into a live engine, whose log-probabilities are then those of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

import lragent
from lragent.runtime.engine import Engine
from lragent.training.schemes import rows_of
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, differences, logprobs, sequence_of


def engine_logprobs(engine: Engine) -> list[list[float]]:
    """Log-probabilities of the script's forced turns."""
    found: list[list[float]] = []
    with engine.trajectory() as t:
        for step in SCRIPT:
            if step[0] == "append":
                t.append(step[1])
            else:
                found.append(t.generate(step[1], forced=step[3]).logprobs)
    return found


@pytest.mark.parametrize("scheme", ["base_lr_shared", "neutral_shared"])
def test_after_a_step_of_training(scheme: str, tmp_path: Path) -> None:
    written, model = SharedModels(tmp_path).get("llama")
    lragent.convert(written.model_dir, written.adapters, tmp_path / "m.lragent", compiled=False)
    engine = lragent.load(tmp_path / "m.lragent", sharing=scheme, backend="eager", kv_memory="4MiB")
    rows = rows_of(scheme, [sequence_of(SCRIPT)], model.agents)
    assert max(differences(logprobs(model, rows), engine_logprobs(engine))) < 1e-4
    model(rows).log_softmax(-1).gather(1, rows.targets_R[:, None]).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data += 0.02 * parameter.grad.sign()
    trained = logprobs(model, rows)
    assert max(differences(trained, engine_logprobs(engine))) > 1e-2
    engine.update_adapters({agent: model.adapter_weights(agent) for agent in model.agents})
    assert max(differences(trained, engine_logprobs(engine))) < 1e-4
