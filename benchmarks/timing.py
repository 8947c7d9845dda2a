"""Times a function several times, alone or in turn with others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of each run, divided by the number of threads, after one warm-up run."""
    return [spent / torch.get_num_threads() for spent in in_turn({"": work}, repeats)[""]]


def in_turn(
    works: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one warm-up round; index i of all lists is one round."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            started = clock()
            work()
            found[name].append(clock() - started)
    return {name: times[1:] for name, times in found.items()}
