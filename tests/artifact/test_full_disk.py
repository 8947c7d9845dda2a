"""A disk that fills up while an artifact is written: an error that says so, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lragent.compile import aoti_package as package
from lragent.errors import NoSpace
from tests.models import WrittenModel

# No file may grow beyond a limit: writing fails as on a full disk, and none is needed. Imports go before it.
LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
import lragent, lragent.artifact.build
from lragent.artifact.directory import new_directory
from lragent.artifact.weights import save_tensors
def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
try:
    {}
except lragent.errors.ArtifactError as error:
    print(error)
"""
CONVERT = 'model, adapter, out = sys.argv[1:]; limit_files(1 << 12); lragent.convert(model, {"a": adapter}, out)'
WEIGHTS = """
    with new_directory(Path(sys.argv[1]), False) as directory:
        limit_files(1 << 16); save_tensors(directory, "base.safetensors", {"w": torch.zeros(1 << 16)})
"""


def _output(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", LIMITED.replace("{}", code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_programs_that_can_not_be_written_whole(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    adapter = next(iter(tiny_llama.adapters.values()))
    said = _output(CONVERT, tiny_llama.model_dir, Path(adapter), tmp_path / "out")
    assert f"{tmp_path / 'out'} can't be written" in said
    assert not list(tmp_path.iterdir())


def test_weights_that_can_not_be_written_whole(tmp_path: Path) -> None:
    said = _output(WEIGHTS, tmp_path / "out")
    assert f"{tmp_path / 'out'} can't be written: base.safetensors" in said
    assert not list(tmp_path.iterdir())


def test_no_room_to_compile_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("C++ compile error: fatal error: when writing output to x.i: No space left on device")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", full)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(NoSpace, match="TMPDIR"):
        package.write_package(program, tmp_path / "package.pt2")
