"""State of one trajectory: tokens, segments, page tables, usage."""

from __future__ import annotations

from dataclasses import dataclass, field

from lragent.runtime.cache.page_table import PageTable
from lragent.runtime.cache.prefix_index import KeyRules
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.usage import Usage


@dataclass(frozen=True)
class TurnSegment:
    """Tokens `[start, end)` that one agent generated; `agent` is None for appended tokens."""

    agent: str | None
    start: int
    end: int


@dataclass(frozen=True)
class StartText:
    """The text that a trajectory began with.

    Args:
        tokens: number of tokens that are left of it.
        whole: False after `truncate` has removed some.
    """

    text: str
    tokens: int
    whole: bool = True

    def cut(self, length: int) -> StartText:
        """The start of a trajectory that keeps its first `length` tokens."""
        return self if length >= self.tokens else StartText(self.text, length, whole=False)


@dataclass(eq=False)
class TrajectoryState:
    """Tokens, their segments, and page tables: one per agent id in `non_shared`, else one under key 0."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)  # None where a token was appended
    segments: list[TurnSegment] = field(default_factory=list)
    page_tables: dict[int, PageTable] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)  # of all requests, those of forks included
    closed: bool = False
    start: StartText | None = None  # None if it began with token ids or with nothing

    def table_for(self, owner: int, agents: int, rules: KeyRules) -> PageTable:
        if owner not in self.page_tables:
            self.page_tables[owner] = PageTable(agents, rules)
        return self.page_tables[owner]

    def add_tokens(self, ids: list[int], agent: str | None, logprobs: list[float] | None = None) -> None:
        start = len(self.tokens)
        if not ids:
            return
        self.tokens += ids
        self.logprobs += logprobs if logprobs is not None else [None] * len(ids)
        self.segments.append(TurnSegment(agent, start, len(self.tokens)))

    def cut(self, length: int, cache: SharedCache) -> None:
        """Removes all tokens from `length` on."""
        del self.tokens[length:]
        del self.logprobs[length:]
        self.segments = [
            TurnSegment(part.agent, part.start, min(part.end, length)) for part in self.segments if part.start < length
        ]
        self.start = None if self.start is None else self.start.cut(length)
        for table in self.page_tables.values():
            table.cut(length, cache)

    def fork(self, cache: SharedCache) -> TrajectoryState:
        """A copy that shares all pages and the usage counters."""
        return TrajectoryState(
            list(self.tokens),
            list(self.logprobs),
            list(self.segments),
            {owner: table.fork(cache) for owner, table in self.page_tables.items()},
            self.usage,
            start=self.start,
        )

    def close(self, cache: SharedCache) -> None:
        """Releases all pages."""
        for table in self.page_tables.values():
            table.drop(cache)
        self.page_tables.clear()
        self.closed = True
