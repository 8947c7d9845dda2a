"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from lragent.runtime.usage import Usage


@dataclass(frozen=True)
class EngineStats:
    """Counters and memory of an engine at one time.

    Args:
        tokens: computed tokens by kind and reused tokens, since the start; `ttft` is a sum over turns.
        turns: finished turns.
        steps: calls of the program.
        held_bytes, peak_held_bytes: bytes of held pages, now and at most; LR blocks count where filled.
        cached_bytes: bytes of pages that are kept for prefix reuse only.
        pages_free, pages_held, pages_cached: they add up to `pages`.
        page_bytes: bytes of one page, base and all LR blocks.
        preemptions: times that a running request lost its pages.
        dropped_tables: times that the page table of an idle trajectory lost its pages.
        evictions: cached pages that were reused for other content.
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
