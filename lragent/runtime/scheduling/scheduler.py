"""Chooses the work of the next step: continuous batching, chunked prefill, admission by free pages, preemption.

    submit -> waiting --admit--> running --finish--> done
                 ^                  |
                 +----- preempt ----+

Both queues are in order of arrival. When pages run out, cached pages are evicted first (page_pool.py), then page tables
that no running request uses are dropped, then the youngest running request is preempted. The oldest request therefore
always makes progress. A request that waits for pages of another request can itself lose all its pages.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field

from lragent.errors import CacheMemoryError
from lragent.runtime.cache.page_table import PageTable
from lragent.runtime.cache.prefix_index import lr_key
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.request import Request
from lragent.runtime.scheduling import prefix_lookup as lookup
from lragent.runtime.scheduling.batch import Entry, Piece, take
from lragent.runtime.schemes import Scheme, View, spans_of_turn
from lragent.runtime.trajectory_state import TrajectoryState

# Limit of logits rows per request and step: a row is a whole vocabulary in float32.
MOST_ROWS = 256


def _arrival(request: Request) -> int:
    return request.arrival


@dataclass(eq=False)
class Scheduler:
    """Queues and memory policy.

    Args:
        states: all open trajectories; shared with the engine.
    """

    scheme: Scheme
    cache: SharedCache
    max_batch_tokens: int
    states: Collection[TrajectoryState]
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    preemptions: int = 0
    dropped_tables: int = 0
    arrivals: int = 0

    def submit(self, request: Request) -> None:
        self.arrivals += 1
        request.arrival = self.arrivals
        self.waiting.append(request)

    def schedule(self) -> list[Entry]:
        """The entries of the next step; their pages are held, and copies of pages are listed.

        A request whose pages can never fit is finished with an error.
        """
        entries: dict[Request, Entry] = {}
        budget = self.max_batch_tokens
        for request in sorted(self.running, key=lambda request: not request.decoding):
            if request in self.running:  # not preempted meanwhile
                budget -= self._prepare(request, budget, entries)
        self._admit(budget, entries)
        return list(entries.values())

    def leave(self, request: Request) -> None:
        """Removes a finished request from the queues."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.cache.claims.end_all(request)
        request.table.last_used = self.arrivals

    def _admit(self, budget: int, entries: dict[Request, Entry]) -> None:
        for request in list(self.waiting):
            if budget <= 0:
                return
            if request.blocked_on in self.cache.claims or request not in self.waiting:
                continue
            match = self._match(request)
            request.blocked_on = match.blocked_on
            if match.blocked_on is not None:
                continue
            found = self._match_with_room(request, match)
            if found is None:
                return  # first come, first served, also for memory
            self._start(request, found)
            budget -= self._prepare(request, budget, entries)

    def _match(self, request: Request) -> lookup.Match:
        return lookup.find(request, self.scheme, self.cache)

    def _match_with_room(self, request: Request, match: lookup.Match) -> lookup.Match | None:
        """Drops idle tables until the request and all running ones have room; None if there is not enough."""
        while True:
            promised = sum(self._pages_to_come(other) for other in self.running)
            need = lookup.new_pages(match, request.table, len(request.state.tokens), self.cache)
            if need + promised <= self.cache.pool.available:
                return match
            busy = {page for other in (*self.running, request) for page in other.table.pages}
            if need + promised > self.cache.pool.total - len(busy) or not self._drop_idle_table(keep=request.table):
                return None
            match = self._match(request)

    def _pages_to_come(self, request: Request) -> int:
        return max(0, self.cache.pages_for(len(request.state.tokens)) - len(request.table.pages))

    def _start(self, request: Request, match: lookup.Match) -> None:
        pool, claims, page_size = self.cache.pool, self.cache.claims, self.cache.page_size
        lookup.attach(match, request, self.scheme, self.cache)
        request.spans = spans_of_turn(self.scheme, self._view(request), request.logits_from)
        if not request.admitted and request.agent is not None:
            starts = [span.start for span in request.spans if not span.adapter_free and span.kind != "acting"]
            request.usage.reused = min([request.prompt, *starts])
            request.admitted = True
        self.waiting.remove(request)
        insort(self.running, request, key=_arrival)
        for index, key in enumerate(match.keys):
            if index >= len(match.pages):
                wanted = lookup.wanted_key(key, (index + 1) * page_size, request, self.scheme)
                claims.add(wanted, request)
            if self.scheme.own_lr_only and request.agent:
                page = match.pages[index] if index < len(match.pages) else None
                if page is None or pool.filled(page, request.agent) < page_size:
                    claims.add(lr_key(key, request.agent), request)

    def _view(self, request: Request) -> View:
        table = request.table
        return View(
            log=table.log,
            computed=table.computed,
            settled=table.settled,
            settled_before=table.settled_before,
            lr_covered=table.lr_covered(self.cache),
            lr_covered_before=tuple(table.lr_covered_before),
            tokens=len(request.state.tokens),
            prompt=request.prompt,
            agent=request.agent,
            turn_start=request.turn_start,
        )

    def _prepare(self, request: Request, budget: int, entries: dict[Request, Entry]) -> int:
        """Adds a request's next pieces to the step and takes their pages. Returns their tokens, 0 on failure."""
        pieces = take(request.spans, budget, MOST_ROWS)
        if not pieces:
            return 0
        entries[request] = Entry(request, pieces)
        if not all(self._get_pages(entries[request], piece, entries) for piece in pieces):
            return 0
        return entries[request].tokens

    def _get_pages(self, entry: Entry, piece: Piece, entries: dict[Request, Entry]) -> bool:
        """Makes the pages of a piece exist and writable; False if the request was preempted or failed."""
        if not piece.span.writes_base:
            return True
        table, pool = entry.request.table, self.cache.pool
        for index in range(piece.start // self.cache.page_size, self.cache.pages_for(piece.end)):
            if index < len(table.pages) and self._own_page(table.pages[index]):
                continue
            if not self._reserve_page(entry.request, entries):
                return False
            if index == len(table.pages):
                table.pages.append(pool.allocate())
            elif not pool.is_exclusive(table.pages[index]):  # its other holder may just have been dropped
                source, target = table.pages[index], pool.allocate()
                pool.copy_filled(source, target)
                pool.release([source])
                table.pages[index] = target
                entry.copies.append((source, target))
        return True

    def _own_page(self, page: int) -> bool:
        """True if a page may be rewritten in place. If no page is left for a copy, it is removed from the index."""
        if self.cache.pool.holders[page] == 1 and not self.cache.pool.available:
            self.cache.pool.forget(page)
        return self.cache.pool.is_exclusive(page)

    def _reserve_page(self, request: Request, entries: dict[Request, Entry]) -> bool:
        """Makes at least one page available; False if the request itself was preempted or failed."""
        while not self.cache.pool.available:
            if self._drop_idle_table(keep=request.table):
                continue
            youngest = self.running[-1]
            if youngest is request and len(self.running) == 1:
                entries.pop(request)
                request.finish(
                    CacheMemoryError(
                        f"a trajectory of {len(request.state.tokens)} tokens doesn't fit: the cache has "
                        f"{self.cache.pool.total} pages of {self.cache.page_size} tokens",
                        "Give a larger kv_memory, or keep the trajectory shorter.",
                    )
                )
                return False
            self._preempt(youngest, entries)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request, entries: dict[Request, Entry]) -> None:
        entries.pop(request, None)
        self.running.remove(request)
        self.cache.claims.end_all(request)
        request.spans = []
        request.table.drop(self.cache)
        insort(self.waiting, request, key=_arrival)
        self.preemptions += 1

    def _drop_idle_table(self, keep: PageTable) -> bool:
        """Drops the pages of one table that no running request uses, the least recently used first.

        Tables that share all their pages with others come last: dropping them frees no page at once.
        """
        busy = {request.table for request in self.running} | {keep}
        queued = {request.table for request in self.waiting}
        idle = [
            table for state in self.states for table in state.page_tables.values() if table.pages and table not in busy
        ]
        if not idle:
            return False

        def order(table: PageTable) -> tuple[bool, bool, int]:
            gains = any(self.cache.pool.holders[page] == 1 for page in table.pages)
            return not gains, table in queued, table.last_used

        min(idle, key=order).drop(self.cache)
        self.dropped_tables += 1
        return True
