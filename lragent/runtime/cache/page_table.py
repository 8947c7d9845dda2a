"""A page table: the pages of one owner's tokens, the counts of stored tokens, and the write log.

The owner is a trajectory, or (trajectory, agent) in `non_shared`. A table may lose its pages while no turn runs on it.
The write log stays, and a later turn replays it.

A token is *processed* if the write log has its writer, *computed* if its page is stored, and *settled* if its page is
final: no later forward will change base K and V. In `rebase_shared` tokens settle in the adapter-free forward after
their turn; in all other schemes every computed token is settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lragent.runtime.cache.prefix_index import KeyRules, extend_keys
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.cache.write_log import WriteRange, cut_log, log_end


@dataclass(eq=False)
class PageTable:
    """`pages[i]` stores tokens `[i * P, (i + 1) * P)`; the counts are explained in `schemes.View`."""

    agents: int  # N + 1, base included
    rules: KeyRules
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    settled: int = 0
    settled_before: int = 0
    lr_covered_before: list[int] = field(default_factory=list)
    log: tuple[WriteRange, ...] = ()
    keys: list[bytes] = field(default_factory=list)  # content keys of full pages of processed tokens
    last_used: int = 0

    def __post_init__(self) -> None:
        self.lr_covered_before = self.lr_covered_before or [0] * self.agents

    def lr_covered(self, cache: SharedCache) -> tuple[int, ...]:
        """By agent id, first tokens whose LR values of this agent are stored (`base_shared`)."""
        return tuple(self._lr_covered_by(agent, cache) for agent in range(self.agents))

    def _lr_covered_by(self, agent: int, cache: SharedCache) -> int:
        tokens = 0
        for page in self.pages:
            filled = cache.pool.filled(page, agent)
            tokens += filled
            if filled < cache.page_size:
                break
        return min(tokens, self.computed)

    def extend_keys(self, tokens: Sequence[int], cache: SharedCache) -> None:
        """Adds the missing keys of full pages of processed tokens."""
        extend_keys(self.keys, self.rules, tokens, self.log, log_end(self.log), cache.page_size)

    def take_rules(self, rules: KeyRules) -> None:
        """Gives its pages other keys from now on."""
        if rules != self.rules:
            self.rules = rules
            self.keys.clear()

    def replace_page(self, index: int, page: int, cache: SharedCache) -> None:
        """Puts a page at `index`, at most one past the end, and releases the page that it replaces."""
        cache.pool.hold(page)
        if index < len(self.pages):
            cache.pool.release([self.pages[index]])
            self.pages[index] = page
        else:
            self.pages.append(page)

    def cut(self, length: int, cache: SharedCache) -> None:
        """Removes tokens from `length` on."""
        self.log = cut_log(self.log, length)
        self.computed = min(self.computed, length)
        self.settled = min(self.settled, length)
        self.settled_before = min(self.settled_before, length)
        self.lr_covered_before = [min(tokens, length) for tokens in self.lr_covered_before]
        del self.keys[length // cache.page_size :]
        self._release_from(cache.pages_for(self.computed), cache)

    def drop(self, cache: SharedCache) -> None:
        """Releases all pages; the write log stays."""
        self.lr_covered_before = list(map(max, self.lr_covered_before, self.lr_covered(cache)))
        self.computed = self.settled = 0
        self._release_from(0, cache)

    def _release_from(self, index: int, cache: SharedCache) -> None:
        cache.pool.release(reversed(self.pages[index:]))
        del self.pages[index:]

    def fork(self, cache: SharedCache) -> PageTable:
        """A table that shares all pages with this one."""
        for page in self.pages:
            cache.pool.hold(page)
        return PageTable(
            self.agents,
            self.rules,
            list(self.pages),
            self.computed,
            self.settled,
            self.settled_before,
            list(self.lr_covered_before),
            self.log,
            list(self.keys),
            self.last_used,
        )
