"""The rows of every sharing scheme: for each token, the agents that process it, and the rows that they read.

| scheme | rows of a token | base K/V that a query reads | LR numbers that it reads |
|---|---|---|---|
| `non_shared` | one per agent that reads it | its own agent's | its own agent's |
| `full_shared`, `base_lr_shared` | its writer's | the writer's | the writer's |
| `base_shared` | one per agent that catches up | the writer's | its own agent's |
| `rebase_shared` | the writer's and adapter-free | adapter-free; its turn's own | as base; of its turns its own |
| `neutral_shared` | adapter-free; acting where logits are wanted | adapter-free | adapter-free |

Sequences that begin alike share rows under `non_shared`, `full_shared`, `base_lr_shared` and `neutral_shared`
(`RowsBuilder.follow`). The writer of a token is the agent that processes it first (`turn_sequence.ActingTurn`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lragent.errors import RequestError
from lragent.runtime.schemes import scheme_named
from lragent.training.rows import Rows
from lragent.training.rows_builder import RowsBuilder
from lragent.training.turn_sequence import ActingTurn, TurnSequence, acting_turns


def rows_of(
    scheme: str,
    sequences: Sequence[TurnSequence],
    agents: Sequence[str],
    scored: Sequence[Sequence[bool]] | None = None,
) -> Rows:
    """The rows of sequences under a scheme.

    Args:
        scheme: one of `SCHEME_ROWS`.
        agents: names in order; agent id = index + 1.
        scored: by sequence and turn, True if the turn's tokens are wanted; None: those of all turns.

    Raises:
        RequestError: the scheme is unknown, no sequence has a turn, or a turn is not valid.
    """
    scheme_named(scheme)
    builder = RowsBuilder()
    for sequence in sequences:
        turns = list(acting_turns(sequence, tuple(agents)))
        if turns:
            SCHEME_ROWS[scheme](builder, sequence, turns)
    if not builder.logits:
        raise RequestError("no sequence has a turn", "Give trajectories in which agents generated tokens.")
    kept = None if scored is None else [flag for turns in scored for flag in turns]
    return builder.rows(whole=scheme in _WHOLE, kept=kept)


def _non_shared(builder: RowsBuilder, sequence: TurnSequence, turns: list[ActingTurn]) -> None:
    last = {acting.agent: acting for acting in turns}
    rows: dict[int, list[int]] = {agent: [] for agent in last}
    for agent, own in rows.items():
        new = builder.follow(sequence, range(last[agent].end), agent, own)
        builder.read(agent, new, own, own)
    for acting in turns:
        builder.want(sequence, acting, [rows[acting.agent][position] for position in acting.wanted])


def _written_once(builder: RowsBuilder, sequence: TurnSequence, turns: list[ActingTurn]) -> None:
    written: list[int] = []
    queries: dict[int, list[int]] = {}
    for acting in turns:
        new = builder.follow(sequence, range(acting.processed, acting.end), acting.agent, written)
        queries.setdefault(acting.agent, []).extend(new)
        builder.want(sequence, acting, written[acting.wanted.start : acting.wanted.stop])
    for agent, own in queries.items():
        builder.read(agent, own, written, written)


def _base_shared(builder: RowsBuilder, sequence: TurnSequence, turns: list[ActingTurn]) -> None:
    written: list[int] = []
    own: dict[int, list[int]] = {}  # by agent, the row of each position that it has processed
    for acting in turns:
        rows = own.setdefault(acting.agent, [])
        if acting.agent == 0:  # it reads no low-rank numbers, so it has nothing to catch up
            rows.extend(written[len(rows) :])
        rows += builder.add(sequence, range(len(rows), acting.end), acting.agent)
        written += rows[acting.processed :]
        builder.want(sequence, acting, [rows[position] for position in acting.wanted])
    for agent, rows in own.items():
        builder.read(agent, [row for row in rows if builder.agents[row] == agent], written, rows)


def _rebase(builder: RowsBuilder, sequence: TurnSequence, turns: list[ActingTurn]) -> None:
    free: list[int] = []  # adapter-free rows by position
    kept: dict[int, list[int]] = {}  # by agent, the rows whose low-rank numbers of this agent are kept
    for number, acting in enumerate(turns):
        span = range(acting.processed, acting.end)
        new = builder.add(sequence, span, acting.agent)
        mine = kept.setdefault(acting.agent, [])
        mine += free[len(mine) :]
        mine += new
        base = free[: acting.processed] + new
        builder.read(acting.agent, new, base, mine)
        builder.want(sequence, acting, [base[position] for position in acting.wanted])
        if acting.agent == 0:  # its rows are adapter-free already
            free += new
        elif number < len(turns) - 1:
            settled = builder.add(sequence, span, 0)
            free += settled
            builder.read(0, settled, free, free)


def _neutral(builder: RowsBuilder, sequence: TurnSequence, turns: list[ActingTurn]) -> None:
    free: list[int] = []
    new = builder.follow(sequence, range(turns[-1].end), 0, free)
    builder.read(0, new, free, free)
    queries: dict[int, list[int]] = {}
    for acting in turns:
        if acting.agent == 0:
            builder.want(sequence, acting, free[acting.wanted.start : acting.wanted.stop])
            continue
        first = len(builder.tokens)
        rows = [builder.row_after(free[position], sequence, position, acting.agent) for position in acting.wanted]
        queries.setdefault(acting.agent, []).extend(range(first, len(builder.tokens)))
        builder.want(sequence, acting, rows)
    for agent, own in queries.items():
        builder.read(agent, own, free, free)


_WHOLE = frozenset(("non_shared", "full_shared"))
SCHEME_ROWS: Mapping[str, Callable[[RowsBuilder, TurnSequence, list[ActingTurn]], None]] = {
    "non_shared": _non_shared,
    "full_shared": _written_once,
    "base_shared": _base_shared,
    "base_lr_shared": _written_once,
    "rebase_shared": _rebase,
    "neutral_shared": _neutral,
}
