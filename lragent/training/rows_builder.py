"""Collects rows and reads of sequences, one token after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lragent.training.adapter_free import parts_of
from lragent.training.rows import Read, Rows
from lragent.training.turn_sequence import ActingTurn, TurnSequence


@dataclass
class RowsBuilder:
    """Rows as they are collected; `base` and `low_rank` of a read are lists by position that may still grow."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    agents: list[int] = field(default_factory=list)
    reads: list[tuple[int, list[int], list[int], list[int]]] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    target_agents: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    turn: int = 0
    known: dict[tuple[int, int, int], int] = field(default_factory=dict)  # row before, token id, agent -> row

    def add(self, sequence: TurnSequence, positions: Iterable[int], agent: int) -> list[int]:
        """Adds rows of one agent and returns them."""
        first = len(self.tokens)
        for position in positions:
            self.tokens.append(sequence.token_ids[position])
            self.positions.append(position)
            self.agents.append(agent)
        return list(range(first, len(self.tokens)))

    def follow(self, sequence: TurnSequence, positions: Iterable[int], agent: int, rows: list[int]) -> list[int]:
        """Extends the rows of the positions before by rows of one agent; returns those that are new.

        Sequences that begin with the same tokens of the same agents have the same rows there: a row follows from the
        row before it. So samples of one prompt, and forks, compute what they have in common once.
        """
        first = len(self.tokens)
        for position in positions:
            rows.append(self.row_after(rows[-1] if rows else -1, sequence, position, agent))
        return list(range(first, len(self.tokens)))

    def row_after(self, before: int, sequence: TurnSequence, position: int, agent: int) -> int:
        """The row of a token that follows from another row; a new one if there is none yet.

        Args:
            before: the last row that it reads besides itself; -1 if there is none.
        """
        key = (before, sequence.token_ids[position], agent)
        if key not in self.known:
            self.known[key] = self.add(sequence, (position,), agent)[0]
        return self.known[key]

    def read(self, agent: int, queries: list[int], base: list[int], low_rank: list[int]) -> None:
        """Adds a read; positions behind the last query's are cut off."""
        if queries:
            end = self.positions[queries[-1]] + 1
            self.reads.append((agent, queries, base[:end], low_rank[:end]))

    def want(self, sequence: TurnSequence, acting: ActingTurn, rows: Sequence[int]) -> None:
        """Marks the rows whose logits predict the tokens of a turn, in order."""
        self.logits += rows
        generated = sequence.token_ids[acting.turn.start : acting.turn.end]
        self.targets += generated
        self.target_agents += [acting.agent] * len(generated)
        self.turns += [self.turn] * len(generated)
        self.turn += 1

    def rows(self, whole: bool, kept: Sequence[bool] | None = None) -> Rows:
        """The rows collected so far.

        Args:
            whole: see `Rows.whole`.
            kept: by number of a turn, True if its tokens are wanted; None: those of all turns.
        """
        wanted = [at for at, turn in enumerate(self.turns) if kept is None or kept[turn]]

        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64)

        def of_wanted(values: Sequence[int]) -> torch.Tensor:
            return tensor([values[at] for at in wanted])

        rows = Rows(
            token_ids_N=tensor(self.tokens),
            positions_N=tensor(self.positions),
            agent_ids_N=tensor(self.agents),
            reads=tuple(Read(agent, *map(tensor, rows)) for agent, *rows in self.reads),
            whole=whole,
            logits_rows_R=of_wanted(self.logits),
            targets_R=of_wanted(self.targets),
            target_agents_R=of_wanted(self.target_agents),
            turns_R=of_wanted(self.turns),
        )
        return replace(rows, parts=parts_of(rows))
