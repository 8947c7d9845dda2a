"""Records what a step wrote: token counts, write log, filled LR blocks, prefix index, claims."""

from __future__ import annotations

from dataclasses import replace

from lragent.runtime.cache.prefix_index import lr_key, open_key
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.cache.write_log import extend_log
from lragent.runtime.request import Request
from lragent.runtime.scheduling.batch import Piece
from lragent.runtime.schemes import Scheme


def record_piece(request: Request, piece: Piece, scheme: Scheme, cache: SharedCache) -> None:
    """Records a piece that has been computed, and removes it from the request's spans."""
    request.usage.count(piece.span.kind, piece.end - piece.start)
    if piece.end < request.spans[0].end:
        request.spans[0] = replace(request.spans[0], start=piece.end)
    else:
        del request.spans[0]
    if piece.span.writes_base:
        _record_base(request, piece, scheme)
    if scheme.own_lr_only:
        _record_lr(request, piece, cache)
    if piece.span.writes:
        request.table.extend_keys(request.state.tokens, cache)
        _index_pages(request, piece, scheme, cache)


def _record_base(request: Request, piece: Piece, scheme: Scheme) -> None:
    table, span = request.table, piece.span
    if not span.adapter_free:
        table.computed = max(table.computed, piece.end)
        since = request.turn_start if scheme.adapter_free_forward else 0
        table.log = extend_log(table.log, span.agent, piece.end, since)
    if span.adapter_free or span.agent == 0 or not scheme.adapter_free_forward:
        table.settled = max(table.settled, piece.end)
        table.settled_before = max(table.settled_before, table.settled)


def _record_lr(request: Request, piece: Piece, cache: SharedCache) -> None:
    agent, pool, page_size = piece.span.agent, cache.pool, cache.page_size
    for index in range(piece.start // page_size, cache.pages_for(piece.end)):
        page, first = request.table.pages[index], index * page_size
        if piece.span.writes_base:
            pool.clip(page, max(piece.start - first, 0))
        if piece.span.lr_writers[agent]:
            pool.fill(page, agent, min(piece.end - first, page_size))


def _index_pages(request: Request, piece: Piece, scheme: Scheme, cache: SharedCache) -> None:
    """Indexes full pages that the piece completed, and ends the claims on them."""
    table, page_size = request.table, cache.page_size
    for index in range(piece.start // page_size, piece.end // page_size):
        key, page_end = table.keys[index], (index + 1) * page_size
        if page_end <= table.settled:
            cache.index.insert(key, table.pages[index])
            cache.claims.end(key, request)
        elif scheme.adapter_free_forward and page_end <= request.prompt:
            # Other requests may start their first turn with the same prompt. Tokens sampled in a turn are not indexed:
            # an indexed page costs a copy when the adapter-free forward rewrites it.
            cache.index.insert(open_key(key), table.pages[index])
            cache.claims.end(open_key(key), request)
        if scheme.own_lr_only and cache.pool.filled(table.pages[index], piece.span.agent) == page_size:
            cache.claims.end(lr_key(key, piece.span.agent), request)
