"""A forward over rows equals the engine on random scripts, alone and packed with others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lragent
from lragent.runtime.engine import Engine
from lragent.runtime.schemes import SCHEMES
from lragent.training.schemes import rows_of
from tests.training.conftest import SharedModels
from tests.training.scripts import differences, logprobs, random_script, sequence_of

SEEDS = range(3)


@pytest.fixture(scope="module")
def engine_of(shared_models: SharedModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    written, _ = shared_models.get("qwen3")
    out: Path = tmp_path_factory.mktemp("engine") / "m.lragent"
    lragent.convert(written.model_dir, written.adapters, out, compiled=False)
    return lambda scheme: lragent.load(out, sharing=scheme, backend="eager", kv_memory="8MiB")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_scripts(scheme: str, shared_models: SharedModels, engine_of: Callable[[str], Engine]) -> None:
    _, model = shared_models.get("qwen3")
    engine = engine_of(scheme)
    scripts = [random_script(seed) for seed in SEEDS]
    expected: list[list[float]] = []
    for script in scripts:
        with engine.trajectory() as t:
            for step in script:
                if step[0] == "append":
                    t.append(step[1])
                else:
                    turn = t.generate(step[1], max_new_tokens=step[2], forced=step[3], ignore_eos=True)
                    expected.append(turn.logprobs)
    sequences = [sequence_of(script) for script in scripts]
    packed = logprobs(model, rows_of(scheme, sequences, model.agents))
    alone = [turn for sequence in sequences for turn in logprobs(model, rows_of(scheme, [sequence], model.agents))]
    assert max(differences(packed, alone)) < 1e-4
    assert max(differences(packed, expected)) < 1e-4
