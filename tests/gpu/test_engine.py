"""An artifact on the device: the same tokens as on the CPU, op by op and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

import lragent
from tests.models import write_model

pytestmark = pytest.mark.gpu


def _tokens(artifact: Path, **options: str) -> list[list[int]]:
    engine = lragent.load(artifact, kv_memory="8MiB", **options)  # type: ignore[arg-type]
    with engine.trajectory([5, 17, 3, 44, 9, 8, 7] * 9) as trajectory:
        return [
            trajectory.generate(agent, max_new_tokens=8, ignore_eos=True).token_ids
            for agent in ("plan", "action", "plan", "reflect")
        ]


@pytest.mark.parametrize("sharing", ["base_lr_shared", "non_shared"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_same_tokens_as_on_the_cpu(tmp_path: Path, backend: str, sharing: str) -> None:
    written = write_model(tmp_path, "llama")
    artifact = tmp_path / "tiny.lragent"
    lragent.convert(written.model_dir, written.adapters, artifact, compiled=False)
    expected = _tokens(artifact, sharing=sharing, backend="eager")
    assert _tokens(artifact, sharing=sharing, backend=backend, device="cuda") == expected
