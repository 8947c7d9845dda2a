"""An engine for some of an artifact's agents holds columns of these only, and computes what one for all computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lragent.errors import RequestError
from lragent.runtime.engine import Engine
from tests.e2e.conftest import Artifacts
from tests.e2e.scripts import SCRIPT, run_on_engine


def _script(*agents: str) -> list[tuple[object, ...]]:
    """The usual script, every role played by one of the agents."""
    turns = [step[1] for step in SCRIPT if step[0] == "turn" and step[1] != "base"]
    role = {name: agents[i % len(agents)] for i, name in enumerate(dict.fromkeys(turns))}
    return [(s[0], role.get(str(s[1]), s[1]), *s[2:]) if s[0] == "turn" else s for s in SCRIPT]


@pytest.mark.parametrize("shared_a", [False, True], ids=["different-A", "shared-A"])
@pytest.mark.parametrize("scheme", ["base_shared", "base_lr_shared", "rebase_shared", "neutral_shared"])
def test_fewer_columns_same_results(
    scheme: str, shared_a: bool, artifacts: Artifacts, open_engine: Callable[..., Engine]
) -> None:
    """Of a shared A, the first agent's block is gone with it: the next agent owns it."""
    _, artifact = artifacts.get("llama", "all", shared_a)
    script = _script("action", "reflect")
    whole, part = open_engine(artifact, scheme), open_engine(artifact, scheme, agents=["reflect", "action"])
    assert part.agents == ("base", "action", "reflect")
    expected, found = run_on_engine(whole, script), run_on_engine(part, script)
    assert [t.token_ids for t in found] == [t.token_ids for t in expected]
    assert [t.logprobs for t in found] == [pytest.approx(t.logprobs, abs=1e-6) for t in expected]
    kept = 1.0 if shared_a and scheme in ("base_lr_shared", "neutral_shared") else 12 / 16 if not shared_a else 2 / 3
    base = 2 * 2 * 16 * 2 * 32 * 4  # K and V of 2 heads in 2 layers, a page of float32
    assert part.stats().page_bytes - base == kept * (whole.stats().page_bytes - base)


def test_others_can_not_act(artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    _, artifact = artifacts.get("llama")
    engine = open_engine(artifact, "base_lr_shared", agents=["action"])
    with (
        engine.trajectory([1, 2]) as t,
        pytest.raises(RequestError, match=r"unknown agent 'plan'.*\nAgents are: base, a"),
    ):
        t.generate("plan", max_new_tokens=1)
    with pytest.raises(RequestError, match="unknown agent 'nobody'"):
        open_engine(artifact, "base_lr_shared", agents=["nobody"])


def test_none_but_the_base(artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    _, artifact = artifacts.get("llama")
    engine = open_engine(artifact, "base_lr_shared", agents=[])
    with engine.trajectory([1, 2, 3]) as t:
        assert len(t.generate("base", max_new_tokens=2, ignore_eos=True).token_ids) == 2
