"""Which pages of a request's trajectory are there already: its own, or indexed ones of others with the same content.

The *wanted* content of a page is what it would be without any cache when the request has run its passes over it. In
`rebase_shared` that is final content for tokens of earlier turns, and for the turn in progress content as its writer
leaves it (an "open" page). Reusing final pages there would change what the turn's own tokens attend to, and with it the
outputs. So open pages are indexed too, under a key of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from lragent.runtime.cache.page_table import PageTable
from lragent.runtime.cache.prefix_index import extend_keys, lr_key, open_key
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.cache.write_log import WriteRange, extend_log, log_end
from lragent.runtime.request import Request
from lragent.runtime.schemes import Scheme


@dataclass(frozen=True)
class Match:
    """Result of a lookup; nothing has been changed by it.

    Args:
        pages: page ids to use, from the table's first page on; some may be the table's own.
        reach: tokens that the wanted content is there for.
        keys: content keys of all full pages of the trajectory, as if the request had processed them.
        blocked_on: key that another request is about to compute and that this one wants next.
    """

    pages: list[int]
    reach: int
    keys: list[bytes]
    blocked_on: bytes | None


def log_after(request: Request, scheme: Scheme) -> tuple[WriteRange, ...]:
    """The record as it will be when the request has processed all its tokens."""
    if request.agent is None:
        return request.table.log
    since = request.turn_start if scheme.adapter_free_forward else 0
    return extend_log(request.table.log, request.agent, len(request.state.tokens), since)


def wanted_key(key: bytes, page_end: int, request: Request, scheme: Scheme) -> bytes:
    """Key of the content that this request wants in a page with content key `key`."""
    in_turn = scheme.adapter_free_forward and request.agent not in (None, 0) and page_end > request.turn_start
    return open_key(key) if in_turn else key


def find(request: Request, scheme: Scheme, cache: SharedCache) -> Match:
    """Looks up the longest prefix of pages that has the wanted content."""
    table, page_size = request.table, cache.page_size
    keys = list(table.keys)
    log = log_after(request, scheme)
    extend_keys(keys, table.rules, request.state.tokens, log, log_end(log), page_size)
    pages: list[int] = []
    blocked_on: bytes | None = None
    own = table.settled // page_size if scheme.adapter_free_forward else table.computed // page_size
    for index, key in enumerate(keys):
        wanted = wanted_key(key, (index + 1) * page_size, request, scheme)
        indexed = cache.index.get(wanted)
        page = table.pages[index] if index < own else indexed
        if page is None:
            blocked_on = blocked_on or _claimed(wanted, request, cache)
            break
        if scheme.own_lr_only and request.agent:
            page = _fuller(page, indexed, request.agent, cache)
            if cache.pool.filled(page, request.agent) < page_size:
                blocked_on = blocked_on or _claimed(lr_key(key, request.agent), request, cache)
        pages.append(page)
    reach = len(pages) * page_size
    if scheme.adapter_free_forward:
        reach = _without_half_turns(reach, request, log)
    return Match(pages, reach, keys, blocked_on)


def _claimed(key: bytes, request: Request, cache: SharedCache) -> bytes | None:
    return key if cache.claims.claimed_by_other(key, request) else None


def _fuller(own: int, other: int | None, agent: int, cache: SharedCache) -> int:
    """Of two pages with equal base content, the one with more of the agent's columns."""
    filled = cache.pool.filled
    return other if other is not None and filled(other, agent) > filled(own, agent) else own


def _without_half_turns(reach: int, request: Request, log: tuple[WriteRange, ...]) -> int:
    """Cuts `reach` back to where a replay can go on.

    In the middle of a finished turn that hasn't been replayed it can't: the rest of that turn attended to open pages,
    and the pages found are final.
    """
    for written in log:
        in_progress = request.agent is not None and written.start >= request.turn_start
        unfinished = written.start < reach < written.end and request.table.computed < written.end
        if unfinished and written.agent != 0 and not in_progress:
            return written.start
    return reach


def _swapped(match: Match, table: PageTable, cache: SharedCache) -> int:
    """How many pages of the match the table takes over.

    Behind `computed` only whole pages: the rest of the last one has other content in the table.
    """
    return match.reach // cache.page_size if match.reach <= table.computed else cache.pages_for(match.reach)


def new_pages(match: Match, table: PageTable, tokens: int, cache: SharedCache) -> int:
    """How many available pages the request takes in all: pages to compute, and matched ones that nobody holds yet."""
    end = _swapped(match, table, cache)
    held = sum(1 for page in match.pages[:end] if cache.pool.holders[page]) + len(table.pages[end:])
    return cache.pages_for(tokens) - held


def attach(match: Match, request: Request, scheme: Scheme, cache: SharedCache) -> None:
    """Makes the request's table use what was found."""
    table = request.table
    for index in range(_swapped(match, table, cache)):
        if index >= len(table.pages) or table.pages[index] != match.pages[index]:
            table.replace_page(index, match.pages[index], cache)
    if match.reach > table.computed and request.agent is not None:
        since = request.turn_start if scheme.adapter_free_forward else 0
        table.log = extend_log(table.log, request.agent, match.reach, since)
    table.computed = max(table.computed, match.reach)
    final = match.reach if request.agent in (None, 0) else min(match.reach, request.turn_start)
    table.settled = max(table.settled, final) if scheme.adapter_free_forward else table.computed
    table.settled_before = max(table.settled_before, table.settled)
