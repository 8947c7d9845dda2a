"""Passes: named rewrites of a graph, their reports, and the function that runs one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import fx

from lragent.errors import InternalError, Miss

log = logging.getLogger(__name__)

Context = TypeVar("Context")


@dataclass(frozen=True)
class PassReport:
    """The result of a pass: the number of changed places, and the places where it did not match."""

    changed: int
    misses: tuple[Miss, ...] = ()


@dataclass(frozen=True)
class Pass(Generic[Context]):
    """A named in-place rewrite of a graph; `Context` holds the facts that it reads in addition to the graph.

    Args:
        required: the program is refused if the pass has a miss.
        hint: advice to the user in that case.
    """

    name: str
    run: Callable[[fx.GraphModule, Context], PassReport]
    required: bool = False
    hint: str = ""


def run_pass(entry: Pass[Context], graph: fx.GraphModule, context: Context) -> PassReport:
    """Runs one pass, checks the graph, and logs time and misses.

    Raises:
        InternalError: the pass failed or left an invalid graph.
    """
    started = time.perf_counter()
    try:
        report = entry.run(graph, context)
        graph.graph.lint()
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise InternalError(f"pass {entry.name} failed: {type(error).__name__}: {error}") from error
    log.info("%s: %d changed in %.2f s", entry.name, report.changed, time.perf_counter() - started)
    for miss in report.misses:
        log.info("%s: %s", entry.name, miss)
    return report
