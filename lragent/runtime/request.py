"""A request to the engine: a turn, a score, or the adapter-free forward that settles a trajectory.

Life of a `Request`: made by make_request.py -> queued by scheduler.py -> admitted (prefix_lookup.py finds reusable
pages, schemes.py lists spans) -> stepped (batch.py packs spans, bookkeeping.py records what they wrote, take_logits.py
samples) -> done, with or without `error`. A request that loses its pages goes back to the queue.
"""

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
    """One unit of work on one trajectory. Fields are grouped by the file that sets them.

    Args (set by make_request.py; fixed, but for `logits_from`, which take_logits.py moves on):
        state: the trajectory; take_logits.py appends sampled tokens to it.
        table: the page table that the request works on.
        agent: agent id; None only makes processed tokens final (`rebase_shared`).
        options, watch: sampling and stop rules.
        seed: of the turn's samples.
        prompt: tokens of the trajectory when the turn began.
        turn_start: processed tokens when the turn began.
        logits_from: first position whose logits are still needed.
        score: tokens from `logits_from + 1` on are given and their log-probabilities returned; nothing is sampled.
        submitted: time of creation, in seconds of `time.perf_counter`.

    Set by scheduling/scheduler.py:
        arrival: order of submission.
        blocked_on: key of a page that another request is about to compute and that this one will reuse.
        admitted: True once the request has been admitted, also after a preemption.
        spans: spans still to run; bookkeeping.py removes finished ones, take_logits.py adds those of the next decode.

    Set by scheduling/bookkeeping.py:
        usage: tokens computed, by kind; the scheduler sets `reused`, take_logits.py sets `ttft`.

    Set by sampling/take_logits.py:
        token_ids: sampled tokens.
        logprobs: one per sampled or scored token.
        sampled_logprobs, kept_mass: one per token of the turn (`lragent.runtime.turn.Turn`).
        finish_reason: "stop" or "length".
        stop_reason: the stop string or token id that ended the turn.

    Set by loop.py (`finish`; the scheduler and take_logits.py set `error` of a request that fails alone):
        done, error: the request has ended; the error that its caller gets, or None.
        on_done: called at the end, for a caller that waits.
    """

    state: TrajectoryState
    table: PageTable
    agent: int | None
    options: TurnOptions
    watch: StopWatch
    prompt: int
    turn_start: int
    logits_from: int
    seed: int = 0
    score: bool = False
    submitted: float = field(default_factory=time.perf_counter)

    arrival: int = 0
    blocked_on: bytes | None = None
    admitted: bool = False
    spans: list[Span] = field(default_factory=list)

    usage: Usage = field(default_factory=Usage)

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float | None] = field(default_factory=list)
    kept_mass: list[float | None] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop_reason: str | int | None = None

    done: bool = False
    error: BaseException | None = None
    on_done: Callable[[], None] | None = None

    @property
    def decoding(self) -> bool:
        """True if one token at a time is left to run."""
        return (
            bool(self.spans)
            and self.spans[-1].end - self.spans[0].start == 1
            and all(span.kind in ("decode", "acting") for span in self.spans)
        )

    def finish(self, error: BaseException | None = None) -> None:
        self.done, self.error = True, error
        if self.on_done is not None:
            self.on_done()
