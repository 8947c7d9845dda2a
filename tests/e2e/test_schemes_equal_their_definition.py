"""Every sharing scheme on every architecture equals its definition; `non_shared` equals PEFT."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lragent.runtime.engine import Engine
from tests.e2e.conftest import Artifacts
from tests.e2e.scripts import SCRIPT, assert_equals_oracle, require_schemes_differ, run_on_engine
from tests.models import KINDS
from tests.oracle.sharing_oracle import SCHEMES


@pytest.mark.parametrize("kind", KINDS)
def test_non_shared_equals_peft(kind: str, artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    """The oracle's non_shared is PEFT itself, see tests/oracle/test_oracle.py."""
    written, artifact = artifacts.get(kind)
    turns = run_on_engine(open_engine(artifact, "non_shared"), SCRIPT)
    assert_equals_oracle(written, "non_shared", SCRIPT, turns)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_schemes(kind: str, scheme: str, artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    written, artifact = artifacts.get(kind)
    turns = run_on_engine(open_engine(artifact, scheme), SCRIPT)
    assert_equals_oracle(written, scheme, SCRIPT, turns)


@pytest.mark.parametrize("shared_a", [False, True], ids=["different-A", "shared-A"])
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_adapter_sets(targets: str, shared_a: bool, artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    written, artifact = artifacts.get("llama", targets, shared_a)
    turns = {s: run_on_engine(open_engine(artifact, s), SCRIPT) for s in SCHEMES}
    require_schemes_differ(written, SCRIPT, turns["non_shared"], SCHEMES)
    for scheme in SCHEMES:
        assert_equals_oracle(written, scheme, SCRIPT, turns[scheme])
