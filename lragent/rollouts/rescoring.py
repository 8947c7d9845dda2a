"""Rescores a sample of a run's trajectories under `non_shared`, on a thread beside the run.

A shared cache can ruin adapters in silence. Where nothing is known of the adapters, the sample tells: the same tokens
are run under the scheme and under `non_shared`, and the distributions of the generated tokens are compared
(`lragent.training.drift`). An error here never touches the run; it becomes a sentence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lragent.errors import UserError, shortened
from lragent.program.drift import SchemeDrift
from lragent.rollouts.turn_sequences import sequence_of

if TYPE_CHECKING:
    from lragent.runtime import Engine, RolloutResult
    from lragent.runtime.evidence import Evidence
    from lragent.training.turn_sequence import TurnSequence

log = logging.getLogger(__name__)

FIRST = 4  # finished trajectories that are always rescored
ONE_OF = 100  # of the others, one of so many
MOST_WAITING = 4  # of these, so many wait at most; the others are left out
NICE = 10  # of the thread; the run has 0


@dataclass(frozen=True)
class Rescored:
    """Drift of the sample.

    Args:
        trajectories: rescored trajectories.
        drift: of the run's scheme; None before the first one.
        max_kl: largest drift that counts as no loss, in nats per token.
        seconds: time that rescoring took, beside the run.
        error: the reason for which it ended early; "" if it did not.
    """

    max_kl: float
    trajectories: int = 0
    drift: SchemeDrift | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def too_far(self) -> bool:
        """True if some agent drifts by more than `max_kl`."""
        return self.drift is not None and self.drift.worst()[1] > self.max_kl

    def in_words(self) -> str:
        """A sentence without its end; "" if nothing was rescored and nothing failed."""
        parts = []
        if self.drift is not None:
            agent, kl = self.drift.worst()
            total = self.drift.total
            parts.append(
                f"drift from non_shared on {self.trajectories} rescored trajectories: {total.mean_kl:.2g} nats a token "
                f"(most: {agent} {kl:.2g}), top-1 {total.agreement:.1%}"
            )
        if self.too_far:
            parts.append(f"above the limit of {self.max_kl:g}, so answers are probably lost")
        if self.error:
            parts.append(f"rescoring failed: {self.error}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For the run file and the summary (docs/results.md)."""
        return {
            "trajectories": self.trajectories,
            "max_kl": self.max_kl,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            **({} if self.drift is None else self.drift.to_dict()),
        }


class Rescorer:
    """Takes finished tasks and rescores some of their trajectories.

    Args:
        scheme: the run's sharing scheme.
        evidence: opens the model.
        on_change: called with the new sum after each trajectory, on the thread of the rescorer.
    """

    def __init__(self, scheme: str, evidence: Evidence, on_change: Callable[[Rescored], None] | None = None) -> None:
        self.found = Rescored(evidence.max_kl)
        self._scheme, self._evidence, self._on_change = scheme, evidence, on_change
        self._offered = 0
        self._stopped = self._warned = False
        self._waiting: queue.Queue[TurnSequence | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="rescoring", daemon=True)
        self._thread.start()

    def offer(self, outcome: RolloutResult) -> None:
        """Takes the first trajectory of a finished task if it belongs to the sample. Returns at once."""
        sequence = None if outcome.error is not None else sequence_of(outcome.trajectories[0])
        if sequence is None or self._stopped:
            return
        self._offered += 1
        if self._offered <= FIRST or (_drawn(outcome) and self._waiting.qsize() < MOST_WAITING):
            self._waiting.put(sequence)

    def finish(self) -> Rescored:
        """Waits for what is left, and returns the sum."""
        self._waiting.put(None)
        self._thread.join()
        self._warn()
        return self.found

    def abandon(self) -> None:
        """Drops what is left; the thread ends after the forward in progress."""
        self._stopped = True
        self._waiting.put(None)

    def _work(self) -> None:
        _yield_to_the_run()
        model = None
        while (sequence := self._waiting.get()) is not None and not self._stopped:
            started = time.monotonic()
            try:
                if model is None:
                    model = self._open()
                drift = self._measure(model, sequence)
            except Exception as error:
                self._stopped = True
                message = error.message if isinstance(error, UserError) else shortened(error)
                self.found = replace(self.found, error=f"{type(error).__name__}: {message}")
            else:
                before = self.found.drift
                self.found = replace(
                    self.found,
                    trajectories=self.found.trajectories + 1,
                    drift=drift if before is None else before.plus(drift),
                )
            self.found = replace(self.found, seconds=self.found.seconds + time.monotonic() - started)
            if self.found.trajectories >= FIRST:
                self._warn()
            if self._on_change is not None:
                self._on_change(self.found)

    def _open(self) -> Any:
        assert self._evidence.open_model is not None
        return self._evidence.open_model()

    def _measure(self, model: Any, sequence: TurnSequence) -> SchemeDrift:
        from lragent.training.drift import measure_drift

        return measure_drift(model, [sequence], [self._scheme]).schemes[0]

    def _warn(self) -> None:
        """Logs once that the run drifts too far."""
        if self.found.too_far and not self._warned:
            self._warned = True
            log.warning("sharing %s: %s", self._scheme, self.found.in_words())


@contextmanager
def rescoring(engine: Engine, wanted: bool, on_change: Callable[[Rescored], None] | None) -> Iterator[Rescorer | None]:
    """A rescorer for a run; None if the scheme needs no check, or its model can't be opened again.

    It is abandoned if the block raises; otherwise the caller finishes it.
    """
    evidence = engine.evidence
    if not wanted or evidence.reason != "none" or evidence.open_model is None:
        yield None
        return
    rescorer = Rescorer(engine.sharing, evidence, on_change)
    try:
        yield rescorer
    except BaseException:
        rescorer.abandon()
        raise


def _yield_to_the_run() -> None:
    """Lowers the priority of this thread, and of those that torch starts for it, where threads have one (Linux)."""
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def _drawn(outcome: RolloutResult) -> bool:
    """True for one of `ONE_OF` tasks, the same ones at any concurrency."""
    name = json.dumps([outcome.task_id, outcome.sample], default=repr).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") % ONE_OF == 0
