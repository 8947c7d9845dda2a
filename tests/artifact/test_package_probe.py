"""A package that crashes is found in a child process; the same road is used on every kind of device."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lragent
from lragent.artifact import open as open_engine
from lragent.artifact import package_probe as probe_package
from lragent.artifact.compiled_files import CompiledKey, keep_compiled
from lragent.artifact.directory import open_artifact
from lragent.artifact.manifest import read_manifest, write_manifest
from lragent.artifact.open import resolve_backend
from lragent.artifact.package_probe import Probe, require_runs
from lragent.compile.compile import Compiled, eager_call, target_name
from lragent.errors import ArtifactError, RequestError
from lragent.graph.graph_file import read_graph
from lragent.kernels.dispatch import resolve
from lragent.passes.pipeline import lower
from lragent.program.cache_schema import CacheSchema

DIES = "#include <stdlib.h>\n__attribute__((constructor)) static void die() { abort(); }\n"
CPU = torch.device("cpu")


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy.lragent"))


@pytest.fixture
def aborting(tiny_artifact: Path, tmp_path: Path) -> Path:
    """The artifact's package with machine code that aborts when it is loaded, as PyTorch's own was seen to do."""
    (tmp_path / "die.cpp").write_text(DIES)
    library = tmp_path / "die.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, tmp_path / "die.cpp"], check=True)
    with zipfile.ZipFile(_package(tiny_artifact)) as whole, zipfile.ZipFile(tmp_path / "dies.pt2", "w") as out:
        for name in whole.namelist():
            out.writestr(name, library.read_bytes() if name.endswith(".so") else whole.read(name))
    return tmp_path / "dies.pt2"


def _package(artifact: Path) -> Path:
    (package,) = artifact.glob("compiled/*/*.pt2")
    return package


def _probe(artifact: Path, package: Path | None = None) -> Probe:
    attention = resolve("auto", "cpu")
    chosen = package or _package(artifact)
    return Probe(str(artifact), "split", str(chosen), attention, attention, "float32", "cpu")


def test_a_package_that_works_passes(tiny_artifact: Path) -> None:
    require_runs(_probe(tiny_artifact))


def test_a_package_that_aborts_is_an_error_with_signal_and_remedy(tiny_artifact: Path, aborting: Path) -> None:
    with pytest.raises(ArtifactError, match=r'dies\.pt2 can\'t be used on cpu: .*SIGABRT(.|\n)*backend="eager"'):
        require_runs(_probe(tiny_artifact, aborting))


def test_a_package_that_can_not_be_loaded_is_an_error_with_its_last_words(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "no.pt2").write_bytes(b"no package")
    with pytest.raises(ArtifactError, match=r"exit code 1: .*RuntimeError"):
        require_runs(_probe(tiny_artifact, tmp_path / "no.pt2"))


def test_a_package_that_hangs_is_an_error(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_package, "SECONDS", 0.01)
    with pytest.raises(ArtifactError, match=r"did not end within 0\.01 s"):
        require_runs(_probe(tiny_artifact))


@pytest.mark.parametrize(
    ("attention", "graph"), [("torch",) * 2, ("inductor", "inductor_decode"), ("inductor", "inductor_prefill")]
)
def test_every_kind_of_graph_gets_a_step_that_it_can_run(
    attention: str, graph: str, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []

    def load(
        file: Path, schema: CacheSchema, weights: Mapping[str, Tensor], device: torch.device
    ) -> Callable[..., None]:
        opened = open_artifact(tiny_artifact)
        program = read_graph(opened.file(opened.manifest.layouts["split"].program), weights)
        call = eager_call(lower(program, graph).graph)
        return lambda *inputs: found.append(call(*inputs))

    monkeypatch.setattr(probe_package, "load_compiled", load)
    probe_package.run(replace(_probe(tiny_artifact), attention=attention, graph=graph))
    (logits,) = found
    assert logits.shape == (2, open_artifact(tiny_artifact).manifest.vocab_size)
    assert bool(logits.isfinite().all())


def test_a_package_of_the_artifact_that_crashes_does_not_end_the_process(
    artifact: Path, aborting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_engine, "PROBED", ("cpu",))
    (key,) = open_artifact(artifact).manifest.compiled[target_name()]
    keep_compiled(open_artifact(artifact), target_name(), CompiledKey.parse(key), aborting)
    with pytest.raises(ArtifactError, match="SIGABRT"):
        lragent.load(artifact, "base_lr_shared", kv_memory="1MiB")


def test_a_package_that_crashes_after_it_was_compiled_is_not_kept(
    artifact: Path, aborting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_engine, "PROBED", ("cpu",))
    monkeypatch.setattr(open_engine, "compile_graph", lambda *arguments: Compiled(aborting))
    write_manifest(replace(read_manifest(artifact), compiled={}), artifact)
    with pytest.raises(ArtifactError, match="SIGABRT"):
        lragent.load(artifact, "base_lr_shared", kv_memory="1MiB")
    assert read_manifest(artifact).compiled == {}


def test_auto_is_compiled_on_a_cpu_and_eager_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    assert (resolve_backend("auto", CPU), resolve_backend("auto", gpu)) == ("compiled", "eager")
    for backend in ("compiled", "eager"):
        assert resolve_backend(backend, CPU) == resolve_backend(backend, gpu) == backend
    with pytest.raises(RequestError, match="unknown backend 'jit'\nUse auto, compiled or eager"):
        resolve_backend("jit", CPU)


def test_a_program_shows_the_backend_that_auto_became(tiny_artifact: Path) -> None:
    assert lragent.load(tiny_artifact, "base_lr_shared", kv_memory="1MiB").program.facts["backend"] == "compiled"
