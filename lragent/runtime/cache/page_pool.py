"""Page pool: which page ids are free, held or only cached, and how many bytes of them are held. No tensors here.

    page 0          scratch: never handed out
    free            holder count 0, not indexed
    held            holder count > 0, indexed or not; held by entries of page tables
    cached          holder count 0, indexed: kept for prefix reuse until someone needs a page

Content of a page with other holders, or of an indexed one, must not change, except that missing LR columns of an agent
may be filled in: they are a function of the page's content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lragent.errors import InternalError
from lragent.program.cache_schema import SCRATCH_PAGE
from lragent.runtime.cache.memory import PageBytes
from lragent.runtime.cache.prefix_index import PrefixIndex


class PagePool:
    """Holder counts and accounting of all pages.

    Args:
        pages: number of pages, the scratch page included.
        sizes: bytes of a page.
        index: keys of pages; a page with a key stays cached after its last holder released it.
        track_lr: True if agents fill their LR columns one by one (`base_shared`); else a page holds all of them.
    """

    def __init__(self, pages: int, sizes: PageBytes, index: PrefixIndex, track_lr: bool) -> None:
        self.total = pages - 1
        self.sizes = sizes
        self.holders = [0] * pages
        self.evictions = 0
        self.peak_bytes = 0
        self._index = index
        self._track_lr = track_lr
        self._free = [page for page in range(pages - 1, -1, -1) if page != SCRATCH_PAGE]
        self._cached: dict[int, None] = {}  # indexed pages without holders, least recently released first
        # Per page and agent id: how many of its first tokens have this agent's LR columns.
        self._filled: list[dict[int, int]] = [{} for _ in range(pages)]
        self._held_pages = 0
        self._held_blocks: Counter[int] = Counter()  # held pages that hold columns of this agent

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return self._held_pages

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return self.free + self.cached

    @property
    def held_bytes(self) -> int:
        if not self._track_lr:
            return self._held_pages * self.sizes.total
        lr_bytes = sum(self.sizes.low_rank[agent] * count for agent, count in self._held_blocks.items())
        return self._held_pages * self.sizes.base + lr_bytes

    def note_peak(self) -> None:
        """Called once a step, when its pages are held and written."""
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def allocate(self) -> int:
        """A page with one holder; evicts the least recently used cached page if none is free.

        Raises:
            InternalError: nothing available; callers ask `available` first.
        """
        if not self._free:
            if not self._cached:
                raise InternalError(f"no page available: free 0 + cached 0, held {self._held_pages} of {self.total}")
            oldest = next(iter(self._cached))
            self.forget(oldest)
            self.evictions += 1
        page = self._free.pop()
        self.hold(page)
        return page

    def hold(self, page: int) -> None:
        """Adds a holder."""
        if self.holders[page] == 0:
            self._cached.pop(page, None)
            self._held_pages += 1
            self._held_blocks.update(self._filled[page].keys())
        self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes one holder from each page. Give a table's pages last first: later pages are worth less to others."""
        for page in pages:
            if self.holders[page] <= 0:
                raise InternalError(f"page {page} released without a holder")
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._held_pages -= 1
                self._held_blocks.subtract(self._filled[page].keys())
                if page in self._index:
                    self._cached[page] = None
                else:
                    self._set_free(page)

    def forget(self, page: int) -> None:
        """Takes a page out of the index; without holders it becomes free."""
        self._index.remove(page)
        self._cached.pop(page, None)
        if self.holders[page] == 0:
            self._set_free(page)

    def is_exclusive(self, page: int) -> bool:
        """Whether its one holder may rewrite it in place."""
        return self.holders[page] == 1 and page not in self._index

    def filled(self, page: int, agent: int) -> int:
        """Tokens at the start of a page that have this agent's LR columns."""
        return self._filled[page].get(agent, 0)

    def fill(self, page: int, agent: int, end: int) -> None:
        """Notes that a held page has this agent's columns for its first `end` tokens."""
        if not self._track_lr or agent == 0:
            return
        if agent not in self._filled[page]:
            self._held_blocks[agent] += 1
        self._filled[page][agent] = max(end, self._filled[page].get(agent, 0))

    def clip(self, page: int, start: int) -> None:
        """Notes that base columns from offset `start` on are rewritten, so that LR columns there are void."""
        filled = self._filled[page]
        for agent in [agent for agent, end in filled.items() if end > start]:
            if start > 0:
                filled[agent] = start
            else:
                del filled[agent]
                self._held_blocks[agent] -= 1

    def copy_filled(self, source: int, target: int) -> None:
        """Notes that held page `target` is now a copy of `source`."""
        self._held_blocks.subtract(self._filled[target].keys())
        self._filled[target] = dict(self._filled[source])
        self._held_blocks.update(self._filled[target].keys())

    def _set_free(self, page: int) -> None:
        self._filled[page].clear()
        self._free.append(page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Proves that the books balance, given the page ids of every open table.

        Raises:
            InternalError: with the sum that fails.
        """
        if self.free + self.held + self.cached != self.total:
            raise InternalError(f"free {self.free} + held {self.held} + cached {self.cached} != {self.total} pages")
        holders = Counter(page for table in tables for page in table)
        for page, count in enumerate(self.holders):
            if holders[page] != count:
                raise InternalError(f"page {page}: holder count {count} != {holders[page]} entries in page tables")
        if holders[SCRATCH_PAGE]:
            raise InternalError("the scratch page is in a page table")
        if len(set(self._free)) != self.free or any(self.holders[page] for page in self._free):
            raise InternalError("a free page is listed twice or has holders")
        held = [page for page, count in enumerate(self.holders) if count]
        if len(held) != self.held:
            raise InternalError(f"{len(held)} pages have holders != held {self.held}")
        blocks = Counter(agent for page in held for agent in self._filled[page])
        if +blocks != +self._held_blocks:
            raise InternalError(f"held LR blocks {dict(blocks)} != counted {dict(self._held_blocks)}")
        self._check_index()

    def _check_index(self) -> None:
        index = self._index
        if {page: key for key, page in index.page_of.items()} != index.key_of:
            raise InternalError(f"index: {len(index.page_of)} keys != {len(index.key_of)} pages, or they disagree")
        unheld = {page for page in index.key_of if not self.holders[page]}
        if unheld != set(self._cached):
            raise InternalError(f"{len(unheld)} indexed pages without holders != cached {self.cached}")
