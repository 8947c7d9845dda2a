"""Forms of attention and projections, compiled to disk, read again, and compared with the scheme's definition."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

import lragent
from lragent.artifact.build import BuildOptions, build
from lragent.loading.model import load_live
from lragent.loading.stages import Stages
from lragent.program.cache_schema import Layout
from tests.coverage.compare import errors_of
from tests.coverage.tiny_model import adapted_model

# One runs in CI: each compiles for half a minute.
FORMS = [
    pytest.param("bloom", id="slopes, fused q k v", marks=pytest.mark.integration),
    *(
        pytest.param(kind, id=form, marks=pytest.mark.slow)
        for kind, form in {
            "gemma2": "softcap, sliding and full layers",
            "mpt": "slopes, another fused q k v",
            "falcon": "one KV head, fused q k v",
            "deepseek_v3": "latent attention",
            "olmo2": "a norm over all heads",
            "phi3": "fused q k v, grouped heads",
            "gpt_oss": "sinks",
            "mimo_v2_flash": "layers of two shapes",
            "gpt2": "fused q k v, no rotation",
            "llama4_text": "a norm after rotation, layers without rotation",
        }.items()
    ),
]
LAYOUTS: dict[str, Layout] = {"base_lr_shared": "split", "non_shared": "dense"}


@pytest.mark.parametrize("kind", FORMS)
def test_compiled_artifact_equals_the_definition(kind: str, tmp_path: Path) -> None:
    _compare(kind, "base_lr_shared", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bloom", "deepseek_v3", "olmo2", "gpt_oss"])
def test_compiled_artifact_equals_peft(kind: str, tmp_path: Path) -> None:
    _compare(kind, "non_shared", tmp_path)


def _compare(kind: str, scheme: str, directory: Path) -> None:
    model = adapted_model(kind)
    out = directory / "m.lragent"
    report = build(load_live(model), out, options=BuildOptions((LAYOUTS[scheme],)), stages=Stages())
    assert len(report.compiled) == 1
    engine = lragent.load(out, sharing=scheme, kv_memory="4MiB")
    assert engine.program.facts["backend"] == "compiled"
    found, allowed = errors_of(engine, scheme, model, copy.deepcopy(model).double())
    assert found <= allowed
