"""Fixtures that several test folders share: a written tiny model, its artifacts, and clean module tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lragent
from tests.models import WrittenModel, write_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on several threads, and results are then the same on any machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    """A llama of two layers with plan, action and reflect adapters on all linear layers."""
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact, compiled for split layout; read only."""
    out = tmp_path_factory.mktemp("artifact") / "tiny.lragent"
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out, layouts=("split",))
    return out


@pytest.fixture(scope="session")
def eager_artifact(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact without packages, which needs no C++ compiler; read only."""
    out = tmp_path_factory.mktemp("eager") / "tiny.lragent"
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out, compiled=False)
    return out


@pytest.fixture
def forget_workflows(tmp_path: Path) -> Iterator[None]:
    """Removes modules that a test wrote and imported, and restores `sys.path`."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    written = [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]
    for name in written:
        del sys.modules[name]
