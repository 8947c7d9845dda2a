"""attention="inductor": two graphs, one for decodes and one for prefill, serve any step and equal the definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lragent
from lragent.runtime.engine import Engine
from tests.e2e.conftest import Artifacts
from tests.e2e.scripts import SCRIPT, assert_equals_oracle, run_on_engine
from tests.e2e.test_batching import PROMPTS, run_together


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
def test_equals_the_definition(kind: str, artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    written, artifact = artifacts.get(kind)
    for scheme in ("non_shared", "base_lr_shared", "rebase_shared", "neutral_shared"):
        turns = run_on_engine(open_engine(artifact, scheme, attention="inductor"), SCRIPT)
        assert_equals_oracle(written, scheme, SCRIPT, turns)


def test_mixed_steps_are_split(artifacts: Artifacts, open_engine: Callable[..., Engine]) -> None:
    _, artifact = artifacts.get("llama")
    expected = run_together(open_engine(artifact, "base_lr_shared"))
    assert len(expected) == len(PROMPTS)
    assert run_together(open_engine(artifact, "base_lr_shared", attention="inductor", max_batch_tokens=33)) == expected


@pytest.mark.integration  # compiles two packages
def test_compiled(artifacts: Artifacts, tmp_path: Path) -> None:
    written, _ = artifacts.get("llama")
    out = tmp_path / "m.lragent"
    report = lragent.convert(written.model_dir, written.adapters, out, layouts=("split",), attention="inductor")
    assert report.compiled == ("split-inductor_decode-float32", "split-inductor_prefill-float32")
    assert {"compile split (inductor_decode)", "compile split (inductor_prefill)"} <= report.seconds.keys()
    engine = lragent.load(out, "base_lr_shared", attention="inductor", kv_memory="4MiB")
    assert_equals_oracle(written, "base_lr_shared", SCRIPT, run_on_engine(engine, SCRIPT))
