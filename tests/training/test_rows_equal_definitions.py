"""A forward over rows computes every scheme as it is defined, on every architecture."""

from __future__ import annotations

import pytest
import torch

from lragent.training.schemes import SCHEME_ROWS, rows_of
from tests.oracle.sharing_oracle import SCHEMES, run_script
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, differences, logprobs, sequence_of


# A norm of keys, sliding windows, fused projections, sinks; the other kinds have the same attention.
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_oss"])
def test_every_scheme(kind: str, shared_models: SharedModels) -> None:
    written, model = shared_models.get(kind)
    sequence = sequence_of(SCRIPT)
    for scheme in SCHEMES:
        found = logprobs(model, rows_of(scheme, [sequence], model.agents))
        exact, single = (
            [turn.logprobs for turn in run_script(written.model_dir, written.adapters, scheme, SCRIPT, dtype)]
            for dtype in (torch.float64, torch.float32)
        )
        allowed = 4 * max(differences(single, exact))
        assert max(differences(found, exact)) <= allowed, scheme


@pytest.mark.parametrize("targets", ["qv", "all"])
def test_shared_a(targets: str, shared_models: SharedModels) -> None:
    written, model = shared_models.get("llama", targets, shared_a=True)
    assert model.adapters is not None
    assert len(model.adapters.a) == len(model.adapters.b) // 3  # one A for three agents
    for scheme in ("base_shared", "base_lr_shared", "neutral_shared"):
        found = logprobs(model, rows_of(scheme, [sequence_of(SCRIPT)], model.agents))
        exact = [turn.logprobs for turn in run_script(written.model_dir, written.adapters, scheme, SCRIPT)]
        assert max(differences(found, exact)) <= 1e-4, scheme


def test_schemes_of_rows_and_of_the_engine() -> None:
    from lragent.runtime.schemes import SCHEMES as ENGINE_SCHEMES

    assert set(ENGINE_SCHEMES) == set(SCHEME_ROWS)
