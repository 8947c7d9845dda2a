"""The work of one step, and the step inputs that are built from it with few tensor operations.

Legend as in program/step.py: T = packed tokens, S = sequences, M = pages per sequence, at most, N = agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from lragent.program.cache_schema import SCRATCH_PAGE
from lragent.program.step import StepInputs
from lragent.runtime.request import Request
from lragent.runtime.schemes import Span


@dataclass(frozen=True)
class Piece:
    """The part `[start, end)` of a span that one step runs."""

    span: Span
    start: int
    end: int

    @property
    def rows(self) -> range:
        """Positions whose logits are needed."""
        return range(max(self.start, self.span.logits_from), self.end)


@dataclass(eq=False)
class Entry:
    """Work of one request in a step.

    Args:
        pieces: in the order in which they must run, see `take`.
        copies: (source, target) pages that are copied before the step.
    """

    request: Request
    pieces: list[Piece]
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the pieces run."""
        return sum(piece.end - piece.start for piece in self.pieces)


def take(spans: Sequence[Span], budget: int, most_rows: int) -> list[Piece]:
    """The next pieces of spans, with at most `budget` tokens and `most_rows` logits rows.

    Spans that are contiguous in position may share a step, also with different agents: each layer writes the cache
    before it attends. So may a span that only reads, over any positions before. A span that goes back to write over
    tokens of the span before it waits for the next step.
    """
    taken: list[Piece] = []
    for span in spans:
        if budget <= 0 or (taken and span.writes and span.start != taken[-1].end):
            break
        end = min(span.end, span.start + budget, max(span.logits_from, span.start) + most_rows)
        if end <= span.start:
            break
        piece = Piece(span, span.start, end)
        taken.append(piece)
        budget -= end - span.start
        most_rows -= len(piece.rows)
        if end < span.end:
            break
    return taken


def _sequences(entry: Entry) -> list[tuple[int, int]]:
    """(tokens, context length) of each sequence of an entry; contiguous pieces of one agent form one sequence."""
    sequences: list[tuple[int, int]] = []
    last: Piece | None = None
    for piece in entry.pieces:
        tokens = piece.end - piece.start
        if last is not None and (piece.span.agent, piece.start) == (last.span.agent, last.end):
            sequences[-1] = (sequences[-1][0] + tokens, piece.end)
        else:
            sequences.append((tokens, piece.end))
        last = piece
    return sequences


def build_step(entries: Sequence[Entry], agents: int, page_size: int) -> StepInputs:
    """Step inputs of all entries, packed in order; logits rows are those of `Piece.rows`, in order.

    If no row is needed, the last token's row is computed: programs are exported for one row or more.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    lengths: list[int] = []
    agent_ids: list[int] = []
    flags: list[tuple[bool, ...]] = []
    rows: list[int] = []
    contexts: list[int] = []
    starts = [0]
    tables: list[list[int]] = []
    for entry in entries:
        pages = entry.request.table.pages
        for piece in entry.pieces:
            first = len(tokens) - piece.start
            rows += [first + position for position in piece.rows]
            tokens += entry.request.state.tokens[piece.start : piece.end]
            positions += range(piece.start, piece.end)
            slots += [pages[at // page_size] * page_size + at % page_size for at in range(piece.start, piece.end)]
            lengths.append(piece.end - piece.start)
            agent_ids.append(piece.span.agent)
            flags.append((piece.span.writes_base, *piece.span.lr_writers[1:]))
        for length, context in _sequences(entry):
            starts.append(starts[-1] + length)
            contexts.append(context)
            tables.append(pages[: -(-context // page_size)])

    def tensor(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    repeats = tensor(lengths)
    writes_NT = torch.tensor(flags, dtype=torch.bool).repeat_interleave(repeats, dim=0).T
    # Slots of the scratch page discard writes.
    kept_NT = torch.where(writes_NT, tensor(slots), SCRATCH_PAGE * page_size)
    width = max(map(len, tables))
    padded = chain.from_iterable((*table, *[SCRATCH_PAGE] * (width - len(table))) for table in tables)
    return StepInputs(
        token_ids=tensor(tokens),
        positions=tensor(positions),
        agent_ids=tensor(agent_ids).repeat_interleave(repeats),
        logits_rows=tensor(rows or [len(tokens) - 1]),
        base_slots=kept_NT[0].contiguous(),
        lr_slots=kept_NT[1:].reshape(agents, len(tokens)).contiguous(),
        seq_starts=tensor(starts),
        context_lens=tensor(contexts),
        page_table=tensor(list(padded)).view(len(tables), width),
    )
