"""Checks a number of CPU threads before torch is set to it."""

from __future__ import annotations

import os

from lragent.errors import RequestError

# More threads than processors gain nothing; OpenMP brings the process down when the system refuses to start one.
MOST_THREADS = max(64, os.cpu_count() or 1)


def require_threads(threads: int | None) -> None:
    """Raises RequestError for a number of threads that torch can't be set to; None keeps torch's setting."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise RequestError(
            f"threads is {threads}, must be from 1 to {MOST_THREADS}",
            f"This machine has {os.cpu_count()} processors; more threads than that gain nothing.",
        )
