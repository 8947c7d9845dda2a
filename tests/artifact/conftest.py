"""Fixtures of the tests that update an artifact; a test file defines `converted`, the artifact that it updates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.artifact.update_cases import write_adapters
from tests.models import WrittenModel


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    return write_adapters(tmp_path_factory.mktemp("update"))


@pytest.fixture
def artifact(converted: Path, tmp_path: Path) -> Path:
    """A copy that a test may update."""
    return Path(shutil.copytree(converted, tmp_path / "copy.lragent"))
