"""Finds pages that a request can reuse: its own pages, and indexed pages of other requests with the same content.

A page matches if its content equals the content that this request would compute from scratch. In `rebase_shared` that
is final content for tokens of earlier turns. For the turn in progress it is the writer's content, before the
adapter-free forward (an *open* page): a final page would change what the turn's own tokens attend to. Open pages are
therefore indexed under a key of their own.
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
    """Result of a lookup, which changes nothing.

    Args:
        pages: page ids to use, from the table's first page on; some may be the table's own.
        reach: first tokens whose matching content is stored.
        keys: content keys of all full pages of the trajectory, once the request has processed them.
        blocked_on: key of the first missing page or LR values, if another request is about to compute them.
    """

    pages: list[int]
    reach: int
    keys: list[bytes]
    blocked_on: bytes | None


def log_after(request: Request, scheme: Scheme) -> tuple[WriteRange, ...]:
    """The write log once the request has processed all its tokens."""
    if request.agent is None:
        return request.table.log
    since = request.turn_start if scheme.adapter_free_forward else 0
    return extend_log(request.table.log, scheme.writer(request.agent), len(request.state.tokens), since)


def wanted_key(key: bytes, page_end: int, request: Request, scheme: Scheme) -> bytes:
    """Key of the content that this request needs in a page with content key `key`: open or final."""
    in_turn = scheme.adapter_free_forward and request.agent not in (None, 0) and page_end > request.turn_start
    return open_key(key) if in_turn else key


def find(request: Request, scheme: Scheme, cache: SharedCache) -> Match:
    """Looks up the longest prefix of matching pages."""
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
    """Of two pages with equal base content, the one with LR values of the agent for more tokens."""
    filled = cache.pool.filled
    return other if other is not None and filled(other, agent) > filled(own, agent) else own


def _without_half_turns(reach: int, request: Request, log: tuple[WriteRange, ...]) -> int:
    """Moves `reach` back to a position from which a replay can continue.

    A replay can't continue inside a finished turn: the rest of that turn attended open pages, and the matched pages are
    final.
    """
    for written in log:
        in_progress = request.agent is not None and written.start >= request.turn_start
        unfinished = written.start < reach < written.end and request.table.computed < written.end
        if unfinished and written.agent != 0 and not in_progress:
            return written.start
    return reach


def _swapped(match: Match, table: PageTable, cache: SharedCache) -> int:
    """Number of matched pages that the table takes over.

    Up to `computed` these are whole pages only: the rest of a last page has other content in the table.
    """
    return match.reach // cache.page_size if match.reach <= table.computed else cache.pages_for(match.reach)


def new_pages(match: Match, table: PageTable, tokens: int, cache: SharedCache) -> int:
    """Number of available pages that the request takes: pages to compute, and matched pages without holders."""
    end = _swapped(match, table, cache)
    held = sum(1 for page in match.pages[:end] if cache.pool.holders[page]) + len(table.pages[end:])
    return cache.pages_for(tokens) - held


def attach(match: Match, request: Request, scheme: Scheme, cache: SharedCache) -> None:
    """Puts the matched pages into the request's page table."""
    table = request.table
    for index in range(_swapped(match, table, cache)):
        if index >= len(table.pages) or table.pages[index] != match.pages[index]:
            table.replace_page(index, match.pages[index], cache)
    if match.reach > table.computed and request.agent is not None:
        since = request.turn_start if scheme.adapter_free_forward else 0
        table.log = extend_log(table.log, scheme.writer(request.agent), match.reach, since)
    table.computed = max(table.computed, match.reach)
    final = match.reach if request.agent in (None, 0) else min(match.reach, request.turn_start)
    table.settled = max(table.settled, final) if scheme.adapter_free_forward else table.computed
    table.settled_before = max(table.settled_before, table.settled)
