"""State of one trajectory: tokens, segments, page tables, usage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from lragent.program.agent import BASE
from lragent.runtime.cache.page_table import PageTable
from lragent.runtime.cache.prefix_index import KeyRules
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.seeds import SeedPath
from lragent.runtime.task_scope import TaskScope
from lragent.runtime.turn import FinishReason
from lragent.runtime.usage import Usage


@dataclass(frozen=True)
class Version:
    """The adapter with which an agent acts on a trajectory.

    Args:
        slot: the agent id under which the program runs it.
        digest: of its weights; "" for `base`.
    """

    agent: str
    slot: int
    digest: str


@dataclass(frozen=True)
class TurnSegment:
    """Tokens `[start, end)` that one agent generated in a turn; `agent` is None for appended tokens.

    Args:
        seed, finish_reason, stop_reason: as in the turn's `Turn`; None for appended tokens. A turn whose last tokens
            were removed later has the finish reason "truncated".
        adapter: digest of the agent's adapter at the time of the turn.
    """

    agent: str | None
    start: int
    end: int
    seed: int | None = None
    finish_reason: FinishReason | Literal["truncated"] | None = None
    stop_reason: str | int | None = None
    adapter: str = ""

    def cut(self, length: int) -> TurnSegment:
        """The segment's tokens below position `length`."""
        if self.end <= length:
            return self
        if self.agent is None:
            return replace(self, end=length)
        return replace(self, end=length, finish_reason="truncated", stop_reason=None)


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
    """Tokens, their segments, and page tables: one per agent id in `non_shared`, else one under key 0.

    Args:
        seeds: from it the seeds of turns derive, with the number of finished `turns`; `forks` counts its children.
        task: the task of a run that the trajectory belongs to.
        versions: by name, the version of each agent that has acted; the trajectory keeps it.
        logprobs, sampled_logprobs, kept_mass: see `lragent.runtime.record.TrajectoryRecord`.
    """

    seeds: SeedPath
    task: TaskScope | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    sampled_logprobs: list[float | None] = field(default_factory=list)
    kept_mass: list[float | None] = field(default_factory=list)
    segments: list[TurnSegment] = field(default_factory=list)
    page_tables: dict[int, PageTable] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)  # of all requests, those of forks included
    turns: int = 0
    forks: int = 0
    closed: bool = False
    start: StartText | None = None  # None if it began with token ids or with nothing

    def table_for(self, owner: int, agents: int, rules: KeyRules) -> PageTable:
        if owner not in self.page_tables:
            self.page_tables[owner] = PageTable(agents, rules)
        return self.page_tables[owner]

    def version_in(self, slot: int) -> Version:
        """The version that acted on this trajectory under an agent id."""
        return next((known for known in self.versions.values() if known.slot == slot), Version(BASE, 0, ""))

    def append(self, ids: list[int]) -> None:
        """Adds tokens that no agent generated."""
        start = len(self.tokens)
        if not ids:
            return
        self.tokens += ids
        for values in (self.logprobs, self.sampled_logprobs, self.kept_mass):
            values += [None] * len(ids)
        self.segments.append(TurnSegment(None, start, len(self.tokens)))

    def add_sampled(self, token: int, logprob: float, sampled_logprob: float | None, kept_mass: float | None) -> None:
        """Adds a token of the turn in progress."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.sampled_logprobs.append(sampled_logprob)
        self.kept_mass.append(kept_mass)

    def cut(self, length: int, cache: SharedCache) -> None:
        """Removes all tokens from `length` on."""
        for values in (self.tokens, self.logprobs, self.sampled_logprobs, self.kept_mass):
            del values[length:]
        self.segments = [part.cut(length) for part in self.segments if part.start < length]
        self.start = None if self.start is None else self.start.cut(length)
        for table in self.page_tables.values():
            table.cut(length, cache)

    def fork(self, cache: SharedCache) -> TrajectoryState:
        """A copy that shares all pages and the usage counters."""
        return TrajectoryState(
            seeds=self.seeds,
            task=self.task,
            start=self.start,
            tokens=list(self.tokens),
            logprobs=list(self.logprobs),
            sampled_logprobs=list(self.sampled_logprobs),
            kept_mass=list(self.kept_mass),
            segments=list(self.segments),
            page_tables={owner: table.fork(cache) for owner, table in self.page_tables.items()},
            versions=dict(self.versions),
            usage=self.usage,
            turns=self.turns,
        )

    def close(self, cache: SharedCache) -> None:
        """Releases all pages; the write logs stay."""
        for table in self.page_tables.values():
            table.drop(cache)
        self.closed = True
