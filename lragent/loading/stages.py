"""Long work in named stages: each is announced and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lragent.errors import InternalError

T = TypeVar("T")
Progress = Callable[[str], None]


@dataclass
class Stages:
    """Runs stages and keeps their seconds; `progress` is told a stage's name when it begins."""

    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Runs `work` as a stage and returns its result.

        Raises:
            InternalError: a stage of this name has run already; its seconds would be lost.
        """
        if name in self.seconds:
            raise InternalError(f"stage {name!r} has run already")
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        return result
