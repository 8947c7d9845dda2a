"""Page pool: the state of every page id (free, held, cached) and the bytes that are held. No tensors here.

    page 0          scratch: never allocated
    free            holder count 0, not indexed
    held            holder count > 0, indexed or not; holders are entries of page tables
    cached          holder count 0, indexed: kept for prefix reuse until a page is needed

A page that is indexed or has several holders must not change. Missing LR values of an agent may still be filled in:
they are a function of the page's content.
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
        sizes: bytes per page.
        index: keys of pages; a page with a key stays cached after its last holder released it.
        track_lr: True if agents fill their LR blocks one by one (`base_shared`); else all blocks of a held page count.
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
        # By page and agent id, the page's first tokens whose LR values of this agent are stored.
        self._filled: list[dict[int, int]] = [{} for _ in range(pages)]
        self._held_pages = 0
        self._held_blocks: Counter[int] = Counter()  # by agent id, held pages with LR values of this agent

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
        """Pages that `allocate` can return."""
        return self.free + self.cached

    @property
    def held_bytes(self) -> int:
        if not self._track_lr:
            return self._held_pages * self.sizes.total
        lr_bytes = sum(self.sizes.low_rank[agent] * count for agent, count in self._held_blocks.items())
        return self._held_pages * self.sizes.base + lr_bytes

    def note_peak(self) -> None:
        """Updates `peak_bytes`; called once per step, when its pages are held and written."""
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def allocate(self) -> int:
        """A page with one holder; evicts the least recently used cached page if none is free.

        Raises:
            InternalError: no page is available; callers check `available` first.
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
        """Removes one holder of each page. Callers pass a table's pages in reverse, to evict its end first."""
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
        """Removes a page from the index; without holders it becomes free."""
        self._index.remove(page)
        self._cached.pop(page, None)
        if self.holders[page] == 0:
            self._set_free(page)

    def is_exclusive(self, page: int) -> bool:
        """True if the page has one holder, which may rewrite it in place."""
        return self.holders[page] == 1 and page not in self._index

    def filled(self, page: int, agent: int) -> int:
        """First tokens of a page whose LR values of this agent are stored."""
        return self._filled[page].get(agent, 0)

    def fill(self, page: int, agent: int, end: int) -> None:
        """Records that LR values of this agent are stored for the first `end` tokens of a held page."""
        if not self._track_lr or agent == 0:
            return
        if agent not in self._filled[page]:
            self._held_blocks[agent] += 1
        self._filled[page][agent] = max(end, self._filled[page].get(agent, 0))

    def clip(self, page: int, start: int) -> None:
        """Records that base K and V from offset `start` on were rewritten, which makes LR values there invalid."""
        filled = self._filled[page]
        for agent in [agent for agent, end in filled.items() if end > start]:
            if start > 0:
                filled[agent] = start
            else:
                del filled[agent]
                self._held_blocks[agent] -= 1

    def forget_lr(self, agent: int) -> None:
        """Records that no page stores LR values of this agent: its adapter is another one."""
        for filled in self._filled:
            filled.pop(agent, None)
        del self._held_blocks[agent]

    def copy_filled(self, source: int, target: int) -> None:
        """Records that held page `target` is a copy of `source`."""
        self._held_blocks.subtract(self._filled[target].keys())
        self._filled[target] = dict(self._filled[source])
        self._held_blocks.update(self._filled[target].keys())

    def _set_free(self, page: int) -> None:
        self._filled[page].clear()
        self._free.append(page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Checks all counts against the page ids of every open page table.

        Raises:
            InternalError: a count is wrong; the message gives the sum.
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
