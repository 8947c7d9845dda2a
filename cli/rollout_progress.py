"""The progress bar of a run over tasks: tasks done and failed, tokens a second, cache in use."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from lragent.rollouts.result_lines import generated_tokens

from .quantities import show_bytes
from .task_bar import task_bar

if TYPE_CHECKING:
    from lragent.rollouts.rescoring import Rescored
    from lragent.runtime import Engine, RolloutResult

REFRESH_SECONDS = 0.2


class RolloutProgress:
    """Follows an engine while it runs tasks.

    Attributes:
        done, failed, tokens: finished tasks (failed ones included), failed tasks, tokens generated in finished tasks.
        seconds: time since the bar was entered.
    """

    def __init__(self, engine: Engine, total: int, title: str) -> None:
        self.done = self.failed = self.tokens = 0
        self._engine = engine
        self._drift = ""
        self._bar = task_bar()
        self._task = self._bar.add_task(title, total=total, remark="")
        self._started = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def count(self, outcome: RolloutResult) -> None:
        """Counts a finished task."""
        self.done += 1
        self.failed += outcome.error is not None
        self.tokens += generated_tokens(outcome)
        self._show()

    def show_drift(self, found: Rescored) -> None:
        """Shows the drift of rescored trajectories from the next refresh on; may be called on any thread."""
        if found.drift is not None:
            total = found.drift.total
            limit = " (too far)" if found.too_far else ""
            self._drift = f", KL {total.mean_kl:.2g}{limit}, top-1 {total.agreement:.0%}"

    def __enter__(self) -> RolloutProgress:
        self._started = time.monotonic()
        self._engine.on_step = self._after_step
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.on_step = None
        self._bar.stop()

    def _after_step(self) -> None:
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        stats = self._engine.stats()
        remark = (
            f"{self.tokens / max(self.seconds, 1e-9):.1f} tokens/s, cache {show_bytes(stats.held_bytes)}{self._drift}"
        )
        if self.failed:
            remark = f"{self.failed} failed, {remark}"
        self._bar.update(self._task, completed=self.done, remark=remark)
