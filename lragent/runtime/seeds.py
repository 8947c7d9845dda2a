"""Seeds of turns: every turn draws numbers of its own, and the same command draws the same numbers again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class SeedPath:
    """The place of a trajectory in a run; all seeds of its turns derive from it.

    Args:
        run: the run's seed.
        task: the task's id; None outside a run.
        sample: number of the task's sample.
        path: number of the trajectory in its task (the one that the workflow is given has 0), then the number of the
            fork at each fork that led to it.
    """

    run: int
    task: Any
    sample: int
    path: tuple[int, ...]

    def child(self, number: int) -> SeedPath:
        return replace(self, path=(*self.path, number))

    def seed(self, turn: int) -> int:
        """Seed of a turn, of 53 bits, which every reader of JSON keeps.

        Args:
            turn: number of turns that were finished on the trajectory before.
        """
        text = json.dumps([self.run, self.task, self.sample, self.path, turn], default=repr)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 11
