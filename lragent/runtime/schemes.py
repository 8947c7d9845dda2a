"""The six sharing schemes: the forwards that a turn needs, and the cache entries that each forward writes.

A forward runs a range of tokens through the model as one agent. It is described by spans; all tokens of a span have
the same write flags. Agent ids: 0 is `base`, i > 0 is agent i of the program. `spans_of_turn` derives the spans from a
`View` of the page table and its write log, so pages that were lost can be computed again (a replay).
A row is one token in one forward; under `neutral_shared` a token whose logits are wanted has two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lragent.errors import RequestError
from lragent.program.cache_schema import Layout, LrBlocks
from lragent.runtime.cache.write_log import WriteRange, log_end

EXACT = "non_shared"  # the scheme that computes PEFT's own outputs

Kind = Literal["prefill", "decode", "acting", "catch_up", "adapter_free", "replay", "rerun"]


@dataclass(frozen=True)
class Span:
    """Tokens `[start, end)` that one agent runs.

    Args:
        adapter_free: True for the adapter-free forward, which makes earlier tokens final (`rebase_shared`).
        writes_base: True if base K and V are stored.
        lr_writers: by agent id (entry 0 is unused), True if this agent's LR block is written.
        logits_from: first position whose logits are needed, `end` for none.
    """

    start: int
    end: int
    agent: int
    kind: Kind
    writes_base: bool
    lr_writers: tuple[bool, ...]
    logits_from: int
    adapter_free: bool = False

    @property
    def writes(self) -> bool:
        """False if the span only reads the cache."""
        return self.writes_base or any(self.lr_writers)


@dataclass(frozen=True)
class View:
    """Inputs of `spans_of_turn`: a page table and the turn to come.

    Args:
        log: write log of processed tokens.
        computed: number of leading tokens whose pages are stored.
        settled: number of leading tokens whose pages are final (below `computed` in `rebase_shared` only).
        settled_before: high-water mark of `settled`; work below it counts as replay.
        lr_covered: by agent id, number of leading tokens whose LR values of this agent are stored (`base_shared`).
        lr_covered_before: high-water mark of `lr_covered`; work below it counts as replay.
        tokens: tokens of the trajectory.
        prompt: tokens of the trajectory when the turn began; later tokens are the turn's own.
        agent: acting agent; None only makes processed tokens final.
        turn_start: processed tokens when the turn began.
    """

    log: tuple[WriteRange, ...]
    computed: int
    settled: int
    settled_before: int
    lr_covered: tuple[int, ...]
    lr_covered_before: tuple[int, ...]
    tokens: int
    prompt: int
    agent: int | None
    turn_start: int

    @property
    def agents(self) -> int:
        """N + 1."""
        return len(self.lr_covered)


def _all_lr(agents: int) -> tuple[bool, ...]:
    return (False, *(True for _ in range(1, agents)))


def _own_lr(agents: int, agent: int) -> tuple[bool, ...]:
    return tuple(index == agent and index > 0 for index in range(agents))


def _writer_span(scheme: Scheme, agents: int, agent: int, start: int, end: int, kind: Kind) -> Span:
    """The span in which tokens of `agent`'s turn are written; `agents` counts `base`."""
    writer = scheme.writer(agent)
    lr_writers = _own_lr(agents, writer) if scheme.own_lr_only else _all_lr(agents)
    return Span(start, end, writer, kind, writes_base=True, lr_writers=lr_writers, logits_from=end)


def _pending(scheme: Scheme, view: View) -> list[Span]:
    """Tokens without a writer: the rest of the prompt, then sampled tokens."""
    if view.agent is None:
        return []
    start = log_end(view.log)
    bounds: list[tuple[int, int, Kind]] = [
        (start, min(view.tokens, view.prompt), "prefill"),
        (max(start, view.prompt), view.tokens, "decode"),
    ]
    return [_writer_span(scheme, view.agents, view.agent, low, high, kind) for low, high, kind in bounds if low < high]


def _spans_written_once(scheme: Scheme, view: View) -> list[Span]:
    """`non_shared` (on the agent's own table), `full_shared`, `base_lr_shared`, `neutral_shared`: the writer's rows."""
    replays = [
        _writer_span(scheme, view.agents, written.agent, max(written.start, view.computed), written.end, "replay")
        for written in view.log
        if written.end > view.computed
    ]
    return replays + _pending(scheme, view)


def _spans_base_shared(scheme: Scheme, view: View) -> list[Span]:
    """Each agent first runs a catch-up over earlier tokens whose LR values of this agent are missing."""
    have = list(view.lr_covered)
    spans: list[Span] = []

    def catch_up(agent: int, end: int, replayed: bool) -> None:
        # LR values that were stored before pages were lost count as replay, the others as catch-up.
        known = end if replayed else min(end, view.lr_covered_before[agent])
        bounds: list[tuple[int, Kind]] = [(known, "replay"), (end, "catch_up")]
        for high, kind in bounds:
            if agent > 0 and have[agent] < high:
                span = Span(have[agent], high, agent, kind, False, _own_lr(view.agents, agent), high)
                spans.append(span)
                have[agent] = high

    for written in view.log:
        if written.end > view.computed:
            start = max(written.start, view.computed)
            catch_up(written.agent, start, replayed=True)
            spans.append(_writer_span(scheme, view.agents, written.agent, start, written.end, "replay"))
            have[written.agent] = written.end
    if view.agent is not None:
        catch_up(view.agent, log_end(view.log), replayed=False)
    return spans + _pending(scheme, view)


def _spans_rebase(scheme: Scheme, view: View) -> list[Span]:
    """Turn by turn: the writer's forward, then the adapter-free forward. The turn in progress has only the first."""
    spans: list[Span] = []
    for written in view.log:
        if written.end > view.computed:
            start = max(written.start, view.computed)
            spans.append(_writer_span(scheme, view.agents, written.agent, start, written.end, "replay"))
        in_progress = view.agent is not None and written.start >= view.turn_start
        if written.agent == 0 or in_progress:
            continue
        # The writer's own LR block keeps the values of its own forward.
        others = tuple(flag and agent != written.agent for agent, flag in enumerate(_all_lr(view.agents)))
        start = max(written.start, view.settled)
        middle = min(max(start, view.settled_before), written.end)
        bounds: list[tuple[int, int, Kind]] = [(start, middle, "replay"), (middle, written.end, "adapter_free")]
        spans += [
            Span(low, high, 0, kind, True, others, high, adapter_free=True) for low, high, kind in bounds if low < high
        ]
    return spans + _pending(scheme, view)


@dataclass(frozen=True)
class Scheme:
    """One way to share a cache between agents.

    Args:
        layout, lr_blocks: the cache tensors (program/cache_schema.py).
        page_table_per_agent: True if each agent of a trajectory has its own page table; else they share one.
        own_lr_only: True if a writer writes its own LR block only, and other agents catch up.
        adapter_free_forward: True if tokens become final in an adapter-free forward after their turn.
        written_as_base: True if `base` writes every token, whoever acts. Rows of other agents (acting rows) only read,
            and exist at positions whose logits are wanted.
        spans: derives the spans of a turn, without logits.
    """

    name: str
    layout: Layout
    lr_blocks: LrBlocks
    page_table_per_agent: bool
    own_lr_only: bool
    adapter_free_forward: bool
    written_as_base: bool
    spans: Callable[[Scheme, View], list[Span]]

    @property
    def writes_all_lr(self) -> bool:
        """True if a page holds the LR values of all agents, computed by its writer."""
        return self.layout == "split" and not self.own_lr_only

    def writer(self, agent: int) -> int:
        """The agent id that writes the tokens of a turn of `agent`."""
        return 0 if self.written_as_base else agent


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("non_shared", "dense", "distinct", True, False, False, False, _spans_written_once),
            Scheme("full_shared", "dense", "distinct", False, False, False, False, _spans_written_once),
            Scheme("base_shared", "split", "per_agent", False, True, False, False, _spans_base_shared),
            Scheme("base_lr_shared", "split", "distinct", False, False, False, False, _spans_written_once),
            Scheme("rebase_shared", "split", "per_agent", False, False, True, False, _spans_rebase),
            Scheme("neutral_shared", "split", "distinct", False, False, False, True, _spans_written_once),
        )
    }
)


def scheme_named(name: str) -> Scheme:
    """Raises RequestError for an unknown name, listing the known ones."""
    if name not in SCHEMES:
        raise RequestError(f"unknown sharing scheme {name!r}", f"Choose one of: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def spans_of_turn(scheme: Scheme, view: View, logits_from: int) -> list[Span]:
    """The spans of a turn, in the order in which they must run.

    Args:
        logits_from: first position whose logits the acting agent needs; ignored without an acting agent.
    """
    spans = scheme.spans(scheme, view)
    if view.agent is None:
        return spans
    return _with_logits(scheme, spans, view.agents, view.agent, view.tokens, logits_from)


def spans_of_decode(scheme: Scheme, agents: int, agent: int, at: int) -> list[Span]:
    """The spans that run the newest token, at position `at`, for its logits; `agents` counts `base`."""
    written = _writer_span(scheme, agents, agent, at, at + 1, "decode")
    return _with_logits(scheme, [written], agents, agent, at + 1, at)


def _with_logits(
    scheme: Scheme, spans: Sequence[Span], agents: int, agent: int, tokens: int, logits_from: int
) -> list[Span]:
    """Marks positions from `logits_from` on, and adds a span for those that the acting agent's spans don't cover.

    The added span reads the cache and writes nothing: acting rows where the scheme has them, else a rerun.

    Args:
        agents: N + 1.
        tokens: of the trajectory.
    """
    tail = len(spans)
    covered = tokens
    while tail > 0 and spans[tail - 1].agent == agent and spans[tail - 1].end == covered:
        tail -= 1
        covered = spans[tail].start
    marked = [replace(span, logits_from=min(max(span.start, logits_from), span.end)) for span in spans[tail:]]
    read_only: list[Span] = []
    if logits_from < covered:
        kind: Kind = "rerun" if scheme.writer(agent) == agent else "acting"
        read_only = [Span(logits_from, covered, agent, kind, False, (False,) * agents, logits_from)]
    return [*spans[:tail], *read_only, *marked]
