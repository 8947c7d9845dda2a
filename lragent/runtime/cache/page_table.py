"""A page table: the pages of one owner's tokens, how far they are filled, and the record of who filled them.

The owner is a trajectory, or (trajectory, agent) in `non_shared`. A table may lose its pages at any time while no turn
runs on it; the record stays, and a later turn replays it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lragent.runtime.cache import write_log as record
from lragent.runtime.cache.page_pool import PagePool
from lragent.runtime.cache.write_log import Run


@dataclass(eq=False)
class PageTable:
    """`pages[i]` holds tokens `[i * P, (i + 1) * P)`; see `schemes.View` for the counts."""

    agents: int  # N + 1, base included
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    settled: int = 0
    settled_before: int = 0
    columns_before: list[int] = field(default_factory=list)
    runs: tuple[Run, ...] = ()
    keys: list[bytes] = field(default_factory=list)  # of full pages below the record's extent
    last_used: int = 0

    def __post_init__(self) -> None:
        self.columns_before = self.columns_before or [0] * self.agents

    def columns(self, pool: PagePool, page_size: int) -> tuple[int, ...]:
        """By agent id, how many tokens from the start have this agent's LR columns (`base_shared`)."""
        return tuple(self._columns_of(agent, pool, page_size) for agent in range(self.agents))

    def _columns_of(self, agent: int, pool: PagePool, page_size: int) -> int:
        tokens = 0
        for page in self.pages:
            filled = pool.filled(page, agent)
            tokens += filled
            if filled < page_size:
                break
        return min(tokens, self.computed)

    def replace_page(self, index: int, page: int, pool: PagePool) -> None:
        """Puts a page of the pool at `index`, which is at most one past the end."""
        pool.hold(page)
        if index < len(self.pages):
            pool.release([self.pages[index]])
            self.pages[index] = page
        else:
            self.pages.append(page)

    def cut(self, length: int, pool: PagePool, page_size: int) -> None:
        """Forgets everything about tokens from `length` on."""
        self.runs = record.cut(self.runs, length)
        self.computed = min(self.computed, length)
        self.settled = min(self.settled, length)
        self.settled_before = min(self.settled_before, length)
        self.columns_before = [min(tokens, length) for tokens in self.columns_before]
        del self.keys[length // page_size :]
        self._release_from(-(-self.computed // page_size), pool)

    def drop(self, pool: PagePool, page_size: int) -> None:
        """Gives all pages back; the record stays."""
        self.columns_before = list(map(max, self.columns_before, self.columns(pool, page_size)))
        self.computed = self.settled = 0
        self._release_from(0, pool)

    def _release_from(self, index: int, pool: PagePool) -> None:
        pool.release(reversed(self.pages[index:]))
        del self.pages[index:]

    def fork(self, pool: PagePool) -> PageTable:
        """A table that shares all pages with this one."""
        for page in self.pages:
            pool.hold(page)
        return PageTable(
            self.agents,
            list(self.pages),
            self.computed,
            self.settled,
            self.settled_before,
            list(self.columns_before),
            self.runs,
            list(self.keys),
            self.last_used,
        )
