"""Prefix reuse by content: keys of full pages, and the index from key to page.

A key is a hash chain: a page's key depends on the page before it, on its token ids, and on whatever else its content
is a function of in the sharing scheme (see `KeyRules`). Adapters go in by digest, never by name, so a key can't be
right by accident.

One page id holds base and LR columns, so one key has to cover both. `rebase_shared` could reuse base columns by token
ids alone, under any writer; with one key for the whole page it doesn't. That is a deliberate simplification.
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
    """What a page's content is a function of, apart from token ids.

    Args:
        root: start of the chain: scheme, and the agent's digest where every agent has its own pages.
        tags: by agent id, what stands for a writer; None if writers don't matter.
        turn_starts: whether the place where a writer's turn began matters.
    """

    root: bytes
    tags: tuple[bytes, ...] | None
    turn_starts: bool


def extend_keys(
    keys: list[bytes], rules: KeyRules, tokens: Sequence[int], log: Sequence[WriteRange], end: int, page_size: int
) -> None:
    """Appends the keys of all full pages below position `end` to `keys`, which holds those of the first pages."""
    while (len(keys) + 1) * page_size <= end:
        start = len(keys) * page_size
        chain = hashlib.blake2b(keys[-1] if keys else rules.root, digest_size=32)
        chain.update(array("q", tokens[start : start + page_size]).tobytes())
        if rules.tags is not None:
            chain.update(_writers(rules, log, start, start + page_size))
        keys.append(chain.digest())


def _writers(rules: KeyRules, log: Sequence[WriteRange], start: int, end: int) -> bytes:
    """Who wrote the tokens of a page, as runs of equal tags with their lengths."""
    if rules.tags is None:
        raise InternalError("keys of this scheme don't name writers")
    merged: list[tuple[bytes, int]] = []
    for written, low, high in ranges_within(log, start, end):
        # `base` reads base columns only, which are final when it writes them: its turns have no visible start.
        begins = rules.turn_starts and written.agent != 0 and written.start == low
        tag = rules.tags[written.agent] + (b"+" if begins else b"-")
        if merged and not begins and merged[-1][0][:-1] == tag[:-1]:
            merged[-1] = (merged[-1][0], merged[-1][1] + high - low)
        else:
            merged.append((tag, high - low))
    return b"".join(hashlib.blake2b(tag, digest_size=32).digest() + length.to_bytes(8, "big") for tag, length in merged)


def open_key(key: bytes) -> bytes:
    """Key of a page whose last turn has not been followed by its adapter-free pass yet (`rebase_shared`)."""
    return hashlib.blake2b(key, digest_size=32, person=b"open").digest()


def lr_key(key: bytes, agent: int) -> bytes:
    """Names one agent's LR columns of a page (`base_shared`); only for telling who computes them at the moment."""
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
