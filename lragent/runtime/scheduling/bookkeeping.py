"""Books what a step wrote: counts, record, LR columns, index."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

from lragent.runtime.cache.page_pool import PagePool
from lragent.runtime.cache.prefix_index import KeyRules, columns_key, extend_keys, open_key
from lragent.runtime.cache.write_log import extended, extent
from lragent.runtime.request import Request
from lragent.runtime.scheduling.batch import Piece
from lragent.runtime.schemes import Scheme


def book(
    request: Request,
    piece: Piece,
    scheme: Scheme,
    rules: KeyRules,
    pool: PagePool,
    claims: MutableMapping[bytes, Request],
    page_size: int,
) -> None:
    """Moves a request past a piece that has been run."""
    request.usage.count(piece.span.kind, piece.end - piece.start)
    if piece.end < request.spans[0].end:
        request.spans[0] = replace(request.spans[0], start=piece.end)
    else:
        del request.spans[0]
    if piece.span.writes_base:
        _book_base(request, piece, scheme)
    if scheme.own_columns:
        _book_columns(request, piece, pool, page_size)
    if piece.span.kind != "rerun":
        table = request.table
        extend_keys(table.keys, rules, request.state.tokens, table.runs, extent(table.runs), page_size)
        _index_pages(request, piece, scheme, pool, claims, page_size)


def _book_base(request: Request, piece: Piece, scheme: Scheme) -> None:
    table, span = request.table, piece.span
    if not span.adapter_free:
        table.computed = max(table.computed, piece.end)
        since = request.turn_start if scheme.adapter_free else 0
        table.runs = extended(table.runs, span.agent, piece.end, since)
    if span.adapter_free or span.agent == 0 or not scheme.adapter_free:
        table.settled = max(table.settled, piece.end)
        table.settled_before = max(table.settled_before, table.settled)


def _book_columns(request: Request, piece: Piece, pool: PagePool, page_size: int) -> None:
    agent = piece.span.agent
    for index in range(piece.start // page_size, -(-piece.end // page_size)):
        page, first = request.table.pages[index], index * page_size
        if piece.span.writes_base:
            pool.clip(page, max(piece.start - first, 0))
        if piece.span.columns[agent]:
            pool.fill(page, agent, min(piece.end - first, page_size))


def _index_pages(
    request: Request,
    piece: Piece,
    scheme: Scheme,
    pool: PagePool,
    claims: MutableMapping[bytes, Request],
    page_size: int,
) -> None:
    """Indexes full pages whose content the piece completed, and ends the claims on them."""
    table = request.table
    for index in range(piece.start // page_size, piece.end // page_size):
        key, page_end = table.keys[index], (index + 1) * page_size
        if page_end <= table.settled:
            pool.index.insert(key, table.pages[index])
            _end_claim(key, request, claims)
        elif scheme.adapter_free and page_end <= request.prompt:
            # Others may start their first turn with the same prompt; tokens sampled in a turn are not worth it, since
            # an indexed page costs a copy when the adapter-free pass rewrites it.
            pool.index.insert(open_key(key), table.pages[index])
            _end_claim(open_key(key), request, claims)
        if scheme.own_columns and pool.filled(table.pages[index], piece.span.agent) == page_size:
            _end_claim(columns_key(key, piece.span.agent), request, claims)


def _end_claim(key: bytes, request: Request, claims: MutableMapping[bytes, Request]) -> None:
    if claims.get(key) is request:
        del claims[key]
        request.claims.discard(key)
