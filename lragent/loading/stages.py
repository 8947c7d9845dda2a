"""Runs long work in named stages, announces each and measures its time."""

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
    """Runs stages and records their seconds.

    Args:
        progress: called with the name of each stage when it begins.
        seconds: stage name -> seconds, of finished stages.
    """

    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Runs `work` as a stage and returns its result.

        Raises:
            InternalError: a stage of this name has already run.
        """
        if name in self.seconds:
            raise InternalError(f"stage {name!r} has run already")
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        return result
