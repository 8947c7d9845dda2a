"""The task of a run in which code is running: its open trajectories, its seeds and its work.

A trajectory or fork that a workflow opens belongs to the workflow's task, also if a coroutine or thread of the workflow
opens it, and is closed with it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from lragent.errors import RequestError
from lragent.runtime.record import TrajectoryRecord
from lragent.runtime.seeds import SeedPath
from lragent.runtime.usage import Usage


class Opened(Protocol):
    """A trajectory, as a task sees it."""

    def record(self) -> TrajectoryRecord: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class TaskScope:
    """State of one task.

    Args:
        seeds: the task's own; its trajectories are children of it.
        usage: work of all trajectories of the task.
        trajectories: the open ones, in order of opening.
        count: number of trajectories opened, forks of the task's own ones left out.
    """

    seeds: SeedPath
    usage: Usage = field(default_factory=Usage)
    trajectories: dict[Opened, None] = field(default_factory=dict)
    count: int = 0
    ended: bool = False

    def enter(self) -> None:
        """Makes this the running task, for the rest of the current asyncio task and for all that it starts."""
        _RUNNING.set(self)

    def require_running(self) -> None:
        """Raises RequestError after the task's end."""
        if self.ended:
            raise RequestError(
                f"task {self.seeds.task!r} has ended, no trajectory can be opened in it",
                "Await everything that a workflow starts before it returns.",
            )

    def next_seeds(self) -> SeedPath:
        """Seeds of one more trajectory of the task."""
        self.count += 1
        return self.seeds.child(self.count - 1)

    def close(self) -> None:
        """Ends the task: closes its open trajectories; turns in progress on them end with RequestError."""
        self.ended = True
        for trajectory in list(self.trajectories):
            trajectory.close()


_RUNNING: ContextVar[TaskScope | None] = ContextVar("lragent_task", default=None)


def running_task() -> TaskScope | None:
    """The task whose workflow is running here; None outside a run."""
    return _RUNNING.get()
