"""The progress of a tuning run: its stage, then a bar with the loss and the time that is left."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from .output import progress, quiet_libraries
from .quantities import show_seconds
from .task_bar import task_bar

if TYPE_CHECKING:
    from lragent.tuning.train import TuneStep

LINES = 10  # of a bar that goes to a file


class TuneProgress:
    """Shows stages and steps; on a terminal as one bar, elsewhere as lines."""

    def __init__(self) -> None:
        self._bar = task_bar()
        self._task = self._bar.add_task("tuning", total=None, remark="")
        self._inside = ExitStack()

    def __enter__(self) -> TuneProgress:
        self._inside.enter_context(quiet_libraries())
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._inside.close()

    def stage(self, name: str) -> None:
        """Shows the stage that begins."""
        if progress.is_terminal:
            self._bar.update(self._task, description=f"tuning: {name}", remark="")
        else:
            progress.print(f"tuning: {name}", markup=False)

    def step(self, news: TuneStep) -> None:
        """Shows the steps done; before the first one, the time that all will take."""
        if news.step == 0 or news.loss is None:
            end = datetime.now() + timedelta(seconds=news.seconds_left)
            left = show_seconds(news.seconds_left)
            progress.print(f"tuning: {news.steps - news.step} steps, about {left}, until {end:%H:%M}", markup=False)
        remark = remark_of(news)
        if progress.is_terminal:
            self._bar.update(self._task, description="tuning", total=news.steps, completed=news.step, remark=remark)
        elif news.step and news.step * LINES // news.steps != (news.step - 1) * LINES // news.steps:
            progress.print(f"tuning: step {news.step} of {news.steps}, {remark}", markup=False)


def remark_of(news: TuneStep) -> str:
    """Loss, value on held-out trajectories, and time left."""
    parts = [] if news.loss is None else [f"loss {news.loss:.4f}"]
    parts += [] if news.held_out is None else [f"held out {news.held_out:.4f}"]
    return ", ".join((*parts, f"{show_seconds(news.seconds_left)} left"))
