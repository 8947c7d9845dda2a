"""The page bookkeeping that all requests of an engine share: pool, prefix index, claims, page size. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field

from lragent.runtime.cache.claims import Claims
from lragent.runtime.cache.memory import PageBytes
from lragent.runtime.cache.page_pool import PagePool
from lragent.runtime.cache.prefix_index import PrefixIndex


@dataclass(eq=False)
class SharedCache:
    """Pages and the rules of access to them.

    Args:
        pool: holder counts of pages, and the order in which pages are evicted.
        index: page keys and the pages that have their content.
        page_size: tokens per page.
        claims: keys of pages that running requests are about to compute.
    """

    pool: PagePool
    index: PrefixIndex
    page_size: int
    claims: Claims = field(default_factory=Claims)

    @staticmethod
    def empty(pages: int, sizes: PageBytes, page_size: int, track_lr: bool) -> SharedCache:
        """A cache with all pages free; arguments as in `PagePool`."""
        index = PrefixIndex()
        return SharedCache(PagePool(pages, sizes, index, track_lr), index, page_size)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens take, the last one possibly not full."""
        return -(-tokens // self.page_size)
