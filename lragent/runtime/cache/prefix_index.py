"""Prefix reuse by content: keys of full pages, and the index from key to page.

Keys form a hash chain. The key of a page depends on the key of the page before it, on its token ids, and on everything
else that determines its content in the sharing scheme (see `KeyRules`). Adapters enter by digest, never by name: the
whole adapter of a writer, and of all agents the A whose columns the page holds.

One page id covers base and LR blocks, so one key must cover both. `rebase_shared` could reuse base K and V by token ids
alone, for any writer. It does not: one key for the whole page is simpler.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lragent.errors import InternalError
from lragent.runtime.cache.write_log import WriteRange, ranges_within


@dataclass(frozen=True)
class KeyRules:
    """Inputs of a page's key besides token ids.

    Args:
        root: start of the chain: the scheme, and the agent's digest if each agent has its own pages.
        tags: by agent id, the tag of a writer; None if the content does not depend on writers.
        turn_starts: True if the content depends on the position where a writer's turn began.
        columns: by agent id, digest of the A of whose `x A` a page holds columns, whoever wrote it; empty if pages hold
            only their writer's own.
    """

    root: bytes
    tags: tuple[bytes, ...] | None
    turn_starts: bool
    columns: tuple[bytes, ...] = ()

    def columns_of(self, agent: int) -> bytes:
        """The entry of `columns` of an agent id; b"" if pages hold their writer's own columns only."""
        return self.columns[agent] if self.columns else b""

    def start(self) -> bytes:
        """The link before the first page's."""
        chain = hashlib.blake2b(self.root, digest_size=32, person=b"start")
        for column in self.columns:
            chain.update(len(column).to_bytes(8, "big") + column)
        return chain.digest()


def extend_keys(
    keys: list[bytes], rules: KeyRules, tokens: Sequence[int], log: Sequence[WriteRange], end: int, page_size: int
) -> None:
    """Appends the missing keys of all full pages below position `end`; `keys` has those of the first pages."""
    while (len(keys) + 1) * page_size <= end:
        start = len(keys) * page_size
        chain = hashlib.blake2b(keys[-1] if keys else rules.start(), digest_size=32)
        chain.update(array("q", tokens[start : start + page_size]).tobytes())
        if rules.tags is not None:
            chain.update(_writers(rules, log, start, start + page_size))
        keys.append(chain.digest())


def _writers(rules: KeyRules, log: Sequence[WriteRange], start: int, end: int) -> bytes:
    """Digest of the writers of a page's tokens: tags with run lengths."""
    if rules.tags is None:
        raise InternalError("keys of this scheme don't name writers")
    merged: list[tuple[bytes, int]] = []
    for written, low, high in ranges_within(log, start, end):
        # `base` attends base K and V only, which are final once it wrote them: its content has no turn start.
        begins = rules.turn_starts and written.agent != 0 and written.start == low
        tag = rules.tags[written.agent] + (b"+" if begins else b"-")
        if merged and not begins and merged[-1][0][:-1] == tag[:-1]:
            merged[-1] = (merged[-1][0], merged[-1][1] + high - low)
        else:
            merged.append((tag, high - low))
    return b"".join(hashlib.blake2b(tag, digest_size=32).digest() + length.to_bytes(8, "big") for tag, length in merged)


def open_key(key: bytes) -> bytes:
    """Key of a page before the adapter-free forward of its last turn (`rebase_shared`)."""
    return hashlib.blake2b(key, digest_size=32, person=b"open").digest()


def lr_key(key: bytes, agent: int) -> bytes:
    """Key of one agent's LR values of a page (`base_shared`); used for claims only."""
    return hashlib.blake2b(key + agent.to_bytes(4, "big"), digest_size=32, person=b"lr").digest()


class PrefixIndex:
    """Keys of pages and pages of keys. Pages leave it through `PagePool.forget` only."""

    def __init__(self) -> None:
        self.page_of: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}

    def __contains__(self, page: object) -> bool:
        return page in self.key_of

    def get(self, key: bytes) -> int | None:
        return self.page_of.get(key)

    def insert(self, key: bytes, page: int) -> bool:
        """Indexes a page; False, and no change, if the key has a page or the page a key already."""
        if key in self.page_of or page in self.key_of:
            return False
        self.page_of[key] = page
        self.key_of[page] = key
        return True

    def remove(self, page: int) -> None:
        """Forgets a page's key, if it has one."""
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.page_of[key]
