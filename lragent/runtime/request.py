"""A request to the engine: a turn, a score, or settling a trajectory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lragent.runtime.cache.page_table import PageTable
from lragent.runtime.sampling.stop_watch import StopWatch
from lragent.runtime.schemes import Span
from lragent.runtime.trajectory_state import TrajectoryState
from lragent.runtime.turn import FinishReason, TurnOptions
from lragent.runtime.usage import Usage


@dataclass(eq=False)
class Request:
    """One unit of work on one trajectory.

    Args:
        agent: agent id; None only makes processed tokens final (`rebase_shared`).
        logits_from: first position whose logits are wanted.
        score: tokens `[logits_from + 1, ...)` are given and their log-probabilities wanted; nothing is sampled.
    """

    state: TrajectoryState
    table: PageTable
    agent: int | None
    options: TurnOptions
    watch: StopWatch
    prompt: int  # tokens when the turn began
    turn_start: int  # processed tokens when the turn began
    logits_from: int
    score: bool = False
    arrival: int = 0
    spans: list[Span] = field(default_factory=list)  # what is left of the plan
    blocked_on: bytes | None = None  # key of a page that another request is about to compute
    usage: Usage = field(default_factory=Usage)
    planned: bool = False  # has been admitted once
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    error: Exception | None = None
    done: bool = False
    on_done: Callable[[], None] | None = None
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def decoding(self) -> bool:
        """Whether one token at a time is left to run."""
        return len(self.spans) == 1 and self.spans[0].kind == "decode"

    def finish(self, error: Exception | None = None) -> None:
        self.done, self.error = True, error
        if self.on_done is not None:
            self.on_done()
