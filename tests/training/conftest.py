"""Tiny models that are written and lowered once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from lragent.loading.model import load_directories
from lragent.training.shared_model import SharedModel
from tests.models import WrittenModel, write_model


class SharedModels:
    """Models by kind, targets and shared A; each is made when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[tuple[str, str, bool], tuple[WrittenModel, SharedModel]] = {}

    def get(self, kind: str, targets: str = "all", shared_a: bool = False) -> tuple[WrittenModel, SharedModel]:
        key = (kind, targets, shared_a)
        if key not in self._made:
            ranks = {"plan": 4, "action": 4 if shared_a else 8, "reflect": 4}
            written = write_model(self._directory / "-".join(map(str, key)), kind, targets, shared_a, ranks, layers=3)
            loaded = load_directories(written.model_dir, written.adapters, "float32")
            self._made[key] = (written, SharedModel.of_model(loaded))
        return self._made[key]


@pytest.fixture(scope="session")
def shared_models(tmp_path_factory: pytest.TempPathFactory) -> SharedModels:
    return SharedModels(tmp_path_factory.mktemp("training"))
