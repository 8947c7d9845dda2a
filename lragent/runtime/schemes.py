"""The five sharing schemes: which passes a turn needs, and what each pass writes.

A pass is a list of spans; a span is a range of tokens that one agent runs with the same write flags. Agent ids: 0 is
`base`, i > 0 is agent i of the program. Spans of a plan run in order; `plan` derives them from a `View` of the page
table, so that a replay after losing pages needs nothing but the record (write_log.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lragent.errors import RequestError
from lragent.program.cache_schema import Columns, Layout
from lragent.runtime.cache.write_log import Run, extent

Kind = Literal["prefill", "decode", "catch_up", "adapter_free", "replay", "rerun"]


@dataclass(frozen=True)
class Span:
    """Tokens `[start, end)` run by one agent.

    Args:
        adapter_free: True for the pass that makes earlier tokens final (`rebase_shared`); it attends base only.
        writes_base: whether base K/V are kept.
        columns: by agent id (entry 0 is unused), whose LR column blocks are kept.
        logits_from: first position whose logits are wanted, `end` for none.
    """

    start: int
    end: int
    agent: int
    kind: Kind
    writes_base: bool
    columns: tuple[bool, ...]
    logits_from: int
    adapter_free: bool = False


@dataclass(frozen=True)
class View:
    """What a plan depends on: a page table and the turn to come.

    Args:
        runs: record of processed tokens.
        computed: tokens whose pages are there, as their writers left them.
        settled: tokens whose content is final (differs from `computed` in `rebase_shared` only).
        settled_before: the most that `settled` has been, before pages were lost.
        columns: by agent id, tokens that have this agent's LR columns (`base_shared`).
        columns_before: the most that `columns` has been, before pages were lost.
        tokens: length of the trajectory.
        prompt: its length when the turn began; later tokens are the turn's own.
        agent: who acts; None only makes processed tokens final.
        turn_start: processed tokens when the turn began.
    """

    runs: tuple[Run, ...]
    computed: int
    settled: int
    settled_before: int
    columns: tuple[int, ...]
    columns_before: tuple[int, ...]
    tokens: int
    prompt: int
    agent: int | None
    turn_start: int

    @property
    def agents(self) -> int:
        """N + 1."""
        return len(self.columns)


def _all_columns(agents: int) -> tuple[bool, ...]:
    return (False, *(True for _ in range(1, agents)))


def _own_columns(agents: int, agent: int) -> tuple[bool, ...]:
    return tuple(index == agent and index > 0 for index in range(agents))


def acting_span(scheme: Scheme, agents: int, agent: int, start: int, end: int, kind: Kind) -> Span:
    """The span in which `agent` is the writer of its tokens; `agents` counts `base`."""
    columns = _own_columns(agents, agent) if scheme.own_columns else _all_columns(agents)
    return Span(start, end, agent, kind, writes_base=True, columns=columns, logits_from=end)


def _pending(scheme: Scheme, view: View) -> list[Span]:
    """Tokens that nobody has processed yet: the rest of the prompt, then sampled ones."""
    if view.agent is None:
        return []
    start = extent(view.runs)
    bounds: list[tuple[int, int, Kind]] = [
        (start, min(view.tokens, view.prompt), "prefill"),
        (max(start, view.prompt), view.tokens, "decode"),
    ]
    return [acting_span(scheme, view.agents, view.agent, low, high, kind) for low, high, kind in bounds if low < high]


def _plan_written_once(scheme: Scheme, view: View) -> list[Span]:
    """`non_shared` (on the agent's own table), `full_shared`, `base_lr_shared`: the writer's pass is all there is."""
    replays = [
        acting_span(scheme, view.agents, run.agent, max(run.start, view.computed), run.end, "replay")
        for run in view.runs
        if run.end > view.computed
    ]
    return replays + _pending(scheme, view)


def _plan_base_shared(scheme: Scheme, view: View) -> list[Span]:
    """Every writer, and the acting agent, first catches up over tokens that it has no LR columns of."""
    have = list(view.columns)
    spans: list[Span] = []

    def catch_up(agent: int, end: int, replayed: bool) -> None:
        # Columns that the agent had before pages were lost count as replay, the others as catch-up.
        known = end if replayed else min(end, view.columns_before[agent])
        bounds: list[tuple[int, Kind]] = [(known, "replay"), (end, "catch_up")]
        for high, kind in bounds:
            if agent > 0 and have[agent] < high:
                span = Span(have[agent], high, agent, kind, False, _own_columns(view.agents, agent), high)
                spans.append(span)
                have[agent] = high

    for run in view.runs:
        if run.end > view.computed:
            start = max(run.start, view.computed)
            catch_up(run.agent, start, replayed=True)
            spans.append(acting_span(scheme, view.agents, run.agent, start, run.end, "replay"))
            have[run.agent] = run.end
    if view.agent is not None:
        catch_up(view.agent, extent(view.runs), replayed=False)
    return spans + _pending(scheme, view)


def _plan_rebase(scheme: Scheme, view: View) -> list[Span]:
    """Turn by turn: the writer's pass, then the adapter-free pass, which the turn in progress doesn't have yet."""
    spans: list[Span] = []
    for run in view.runs:
        if run.end > view.computed:
            start = max(run.start, view.computed)
            spans.append(acting_span(scheme, view.agents, run.agent, start, run.end, "replay"))
        in_progress = view.agent is not None and run.start >= view.turn_start
        if run.agent == 0 or in_progress:
            continue
        # The writer keeps its own columns.
        others = tuple(flag and agent != run.agent for agent, flag in enumerate(_all_columns(view.agents)))
        start = max(run.start, view.settled)
        middle = min(max(start, view.settled_before), run.end)
        bounds: list[tuple[int, int, Kind]] = [(start, middle, "replay"), (middle, run.end, "adapter_free")]
        spans += [
            Span(low, high, 0, kind, True, others, high, adapter_free=True) for low, high, kind in bounds if low < high
        ]
    return spans + _pending(scheme, view)


@dataclass(frozen=True)
class Scheme:
    """One way to share a cache between agents.

    Args:
        layout, columns: which cache tensors it needs (program/cache_schema.py).
        agent_tables: every agent has its own page table; otherwise a trajectory has one.
        own_columns: a writer fills its own LR columns only, the others catch up.
        adapter_free: tokens become final in an adapter-free pass after their turn.
        spans: the passes of a turn.
    """

    name: str
    layout: Layout
    columns: Columns
    agent_tables: bool
    own_columns: bool
    adapter_free: bool
    spans: Callable[[Scheme, View], list[Span]]


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("non_shared", "dense", "distinct", True, False, False, _plan_written_once),
            Scheme("full_shared", "dense", "distinct", False, False, False, _plan_written_once),
            Scheme("base_shared", "split", "per_agent", False, True, False, _plan_base_shared),
            Scheme("base_lr_shared", "split", "distinct", False, False, False, _plan_written_once),
            Scheme("rebase_shared", "split", "per_agent", False, False, True, _plan_rebase),
        )
    }
)


def scheme_named(name: str) -> Scheme:
    """Raises RequestError for an unknown name, listing the known ones."""
    if name not in SCHEMES:
        raise RequestError(f"unknown sharing scheme {name!r}", f"Choose one of: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def plan(scheme: Scheme, view: View, logits_from: int) -> list[Span]:
    """The passes of a turn, in order.

    Args:
        logits_from: first position whose logits the acting agent needs; ignored if nobody acts.
    """
    spans = scheme.spans(scheme, view)
    return spans if view.agent is None else with_logits(spans, view, view.agent, logits_from)


def with_logits(spans: Sequence[Span], view: View, agent: int, logits_from: int) -> list[Span]:
    """Marks positions from `logits_from` on, and runs those again that the acting agent's spans don't reach.

    A rerun reads the cache as it is and keeps nothing.
    """
    tail = len(spans)
    covered = view.tokens
    while tail > 0 and spans[tail - 1].agent == agent and spans[tail - 1].end == covered:
        tail -= 1
        covered = spans[tail].start
    marked = [replace(span, logits_from=min(max(span.start, logits_from), span.end)) for span in spans[tail:]]
    nothing = (False,) * view.agents
    rerun = [Span(logits_from, covered, agent, "rerun", False, nothing, logits_from)] if logits_from < covered else []
    return [*spans[:tail], *rerun, *marked]
