"""Layers that the chosen attention implementation can't run: reports, facts of the program and one warning say so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import lragent
from lragent.artifact.build import BuildOptions, ConvertReport, build
from lragent.errors import Miss
from lragent.kernels import cpp_library
from lragent.loading.model import load_live
from lragent.loading.stages import Stages
from tests.coverage.tiny_model import adapted_model

pytestmark = pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")

REASON = "cpp has no norm over all heads; runs torch"
FACT = "cpp, torch on 2 of 2 layers"


@pytest.fixture(scope="module")
def wide_norm() -> Any:
    """A PEFT model of two layers, whose keys have one norm over all heads."""
    return adapted_model("olmo2")


@pytest.fixture(scope="module")
def artifact(wide_norm: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConvertReport, Path]:
    out = tmp_path_factory.mktemp("wide") / "m.lragent"
    return (
        build(load_live(wide_norm), out, options=BuildOptions(attention="cpp"), stages=Stages(), wanted=("split",)),
        out,
    )


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("lragent")]


def _places(misses: tuple[Miss, ...]) -> list[tuple[str, str]]:
    return [(miss.where, miss.reason) for miss in misses]


def test_the_report_names_every_layer(artifact: tuple[ConvertReport, Path]) -> None:
    report, _ = artifact
    assert list(report.misses) == ["split"]  # dense layout caches keys after their norm
    assert _places(report.misses["split"]) == [("layer 0", REASON), ("layer 1", REASON)]


def test_inspect_names_every_layer_for_every_implementation(artifact: tuple[ConvertReport, Path]) -> None:
    _, path = artifact
    misses = lragent.inspect(path).misses
    assert list(misses) == ["split"]
    others = ("triton", "inductor_decode", "inductor_prefill")
    reasons = (REASON, *(REASON.replace("cpp", name) for name in others))
    assert sorted(_places(misses["split"])) == sorted((f"layer {i}", reason) for i in (0, 1) for reason in reasons)


def test_an_opened_artifact_says_so(artifact: tuple[ConvertReport, Path], caplog: pytest.LogCaptureFixture) -> None:
    _, path = artifact
    engine = lragent.load(path, "base_lr_shared", kv_memory="4MiB", backend="eager", attention="cpp")
    assert engine.program.facts["attention"] == FACT
    assert _warnings(caplog) == [f"attention {FACT}: {REASON}"]


def test_a_live_model_says_so(wide_norm: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = lragent.optimize(wide_norm, "base_lr_shared", kv_memory="4MiB", backend="eager", attention="cpp")
    assert engine.program.facts["attention"] == FACT
    assert _warnings(caplog) == [f"attention {FACT}: {REASON}"]


def test_an_implementation_of_two_graphs_counts_a_layer_once(
    artifact: tuple[ConvertReport, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, path = artifact
    engine = lragent.load(path, "base_lr_shared", kv_memory="4MiB", backend="eager", attention="inductor")
    assert engine.program.facts["attention"] == FACT.replace("cpp", "inductor")
    assert len(_warnings(caplog)) == 1


@pytest.mark.parametrize(("attention", "sharing"), [("torch", "base_lr_shared"), ("cpp", "non_shared")])
def test_near_miss_all_layers_run_the_chosen_implementation(
    attention: str, sharing: str, artifact: tuple[ConvertReport, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, path = artifact
    engine = lragent.load(path, sharing, kv_memory="4MiB", backend="eager", attention=attention)
    assert engine.program.facts["attention"] == attention
    assert _warnings(caplog) == []


@pytest.mark.slow
def test_a_compiled_package_says_so(wide_norm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Opening a package lowers nothing: the manifest holds the layers."""
    out = tmp_path / "m.lragent"
    report = build(load_live(wide_norm), out, options=BuildOptions(("split",), attention="cpp"), stages=Stages())
    assert report.compiled == ("split-cpp-float32",)
    engine = lragent.load(out, "base_lr_shared", kv_memory="4MiB", attention="cpp")
    assert (engine.program.facts["backend"], engine.program.facts["attention"]) == ("compiled", FACT)
    assert _warnings(caplog) == [f"attention {FACT}: {REASON}"]
