"""Engines over tiny models of any architecture, made from artifacts that are converted once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lragent
from lragent.runtime.engine import Engine
from tests.models import WrittenModel, write_model


class Artifacts:
    """Models by kind, targets and shared A; each is written and converted when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[tuple[str, str, bool], tuple[WrittenModel, Path]] = {}

    def get(self, kind: str, targets: str = "all", shared_a: bool = False) -> tuple[WrittenModel, Path]:
        key = (kind, targets, shared_a)
        if key not in self._made:
            folder = self._directory / "-".join(map(str, key))
            ranks = {"plan": 4, "action": 4, "reflect": 4} if shared_a else {"plan": 4, "action": 8, "reflect": 4}
            written = write_model(folder, kind, targets, shared_a, ranks)
            out = folder / "m.lragent"
            lragent.convert(written.model_dir, written.adapters, out, compiled=False)
            self._made[key] = (written, out)
        return self._made[key]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("e2e"))


@pytest.fixture
def open_engine() -> Callable[..., Engine]:
    """Opens an artifact without compiling."""

    def open_it(path: Path, sharing: str, **options: Any) -> Engine:
        defaults = {"kv_memory": "4MiB", "backend": "eager"}
        return lragent.load(path, sharing=sharing, **{**defaults, **options})

    return open_it
