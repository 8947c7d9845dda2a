"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from lragent.runtime.usage import Usage


@dataclass(frozen=True)
class EngineStats:
    """A snapshot.

    Args:
        tokens: computed tokens by kind and reused tokens, of everything so far; `ttft` is a sum over turns.
        turns: finished turns.
        steps: calls of the program.
        held_bytes, peak_held_bytes: of pages that trajectories hold, now and at most; LR columns count where filled.
        cached_bytes: of pages kept for prefix reuse only.
        pages_free, pages_held, pages_cached: they add up to `pages`.
        page_bytes: base and all LR columns of one page.
        preemptions: running requests that lost their pages.
        dropped_tables: tables of idle trajectories that lost their pages.
        evictions: cached pages given up for others.
    """

    tokens: Usage
    turns: int
    steps: int
    held_bytes: int
    peak_held_bytes: int
    cached_bytes: int
    pages: int
    pages_free: int
    pages_held: int
    pages_cached: int
    page_size: int
    page_bytes: int
    preemptions: int
    dropped_tables: int
    evictions: int
