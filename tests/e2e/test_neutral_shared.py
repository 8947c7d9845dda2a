"""`neutral_shared` on real architectures: no result depends on who wrote, and `base` is the plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import pytest
import torch

from lragent.runtime.engine import Engine
from tests.e2e.conftest import Artifacts
from tests.e2e.scripts import PROMPT
from tests.oracle.peft_oracle import generate, load_plain

PARTS = ([17, 23, 5], [91, 14, 66, 2], [39, 88])
SCORED = [44, 101, 9, 70]
AGENTS = ("base", "plan", "action", "reflect")
KINDS = ("llama", "qwen3", "gemma3_text", "gpt_oss")  # rotation, norm, sliding window, sinks


def scores(engine: Engine, writers: Sequence[str]) -> dict[str, list[float]]:
    """Every agent's log-probabilities of the same tokens, after turns of `writers` with the same text."""
    with engine.trajectory(PROMPT) as t:
        for name, part in zip(writers, PARTS, strict=True):
            t.generate(name, forced=part)
        return {name: t.score(name, SCORED) for name in AGENTS}


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_writers(
    kind: str, artifacts: Artifacts, open_engine: Callable[..., Engine]
) -> None:
    _, artifact = artifacts.get(kind)
    found = [
        scores(open_engine(artifact, "neutral_shared"), writers)
        for writers in (AGENTS[1:], AGENTS[:0:-1], ("base",) * 3)
    ]
    for other in found[1:]:
        for name in AGENTS:
            assert other[name] == pytest.approx(found[0][name], abs=1e-5)
    left, right = (scores(open_engine(artifact, "base_lr_shared"), w)["plan"] for w in (AGENTS[1:], AGENTS[:0:-1]))
    assert left != pytest.approx(right, abs=1e-3)  # the adapters are strong enough for it to show


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_the_plain_model(kind: str, artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    written, artifact = artifacts.get(kind)
    found = scores(open_engine(artifact, "neutral_shared"), AGENTS[1:])["base"]
    plain = load_plain(written.model_dir, torch.float64)
    _, expected = generate(plain, [*PROMPT, *chain(*PARTS)], "base", len(SCORED), SCORED)
    assert found == pytest.approx(expected, abs=1e-4)
