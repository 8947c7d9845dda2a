"""Trajectories of result files as sequences whose turns are scored or only read.

Turns that say nothing of the adapters given are only read, and counted: cut ones, and those of other adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lragent.errors import TaskFileError
from lragent.program.agent import BASE
from lragent.rollouts.read_trajectories import (
    FailedLine,
    RecordedTrajectory,
    RecordedTurn,
    read_recorded,
    require_fits,
)
from lragent.training.turn_sequence import Turn, TurnSequence

Seen = set[tuple[str, tuple[int, ...]]]  # agents and tokens of turns


@dataclass(frozen=True)
class ReadSequence:
    """One trajectory, up to its last scored turn.

    Args:
        scored: by turn of the sequence, True if its tokens are judged. The others are only read.
        gold: True if nobody rolled it out.
        logprobs: recorded log-probabilities of the scored tokens, in order; empty if some are missing.
        place: file and line, for messages.
        line: the line's object.
    """

    sequence: TurnSequence
    scored: tuple[bool, ...]
    gold: bool
    logprobs: tuple[float, ...]
    place: str
    line: Mapping[str, Any]


@dataclass
class Skipped:
    """Counts of lines and turns that are not scored.

    Args:
        failed_lines: lines whose task ended in an error.
        truncated: turns whose end was removed later.
        other_adapters: by agent, turns of an adapter with another digest than the one given.
        repeated: turns of forks that their parents have too.
        empty: trajectories without a scored turn.
        digests: by agent, the other digests.
    """

    failed_lines: int = 0
    truncated: int = 0
    other_adapters: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    empty: int = 0
    digests: dict[str, set[str]] = field(default_factory=dict)

    def sentences(self) -> tuple[str, ...]:
        """Sentences for the user, one for each kind that occurred."""
        others = ", ".join(f"{count} of {agent}" for agent, count in sorted(self.other_adapters.items()))
        found = (
            (self.failed_lines, f"skipped lines whose task ended in an error: {self.failed_lines}"),
            (self.truncated, f"skipped turns whose end was removed later: {self.truncated}"),
            (others, f"skipped turns of other adapters than those given: {others}"),
            (self.repeated, f"skipped turns of forks that are their parents' too: {self.repeated}"),
            (self.empty, f"skipped trajectories without a turn that counts: {self.empty}"),
        )
        return tuple(sentence for count, sentence in found if count)


@dataclass(frozen=True)
class Accepted:
    """Trajectories that fit a model and its agents.

    Args:
        digests: agent -> digests of its adapter, one for each dtype that a run may have had.
        vocab_size, positions: of the model.
    """

    digests: Mapping[str, frozenset[str]]
    vocab_size: int
    positions: int

    def known(self, agent: str) -> frozenset[str]:
        return frozenset(("",)) if agent == BASE else self.digests[agent]


def read_scored_sequences(files: Iterable[Path], accepted: Accepted) -> tuple[tuple[ReadSequence, ...], Skipped]:
    """Reads files of results or gold.

    Raises:
        TaskFileError: a file can't be read; a span names an unknown agent; a token is outside the vocabulary, or a
            trajectory has more tokens than the model has positions; or no scored turn is left.
    """
    sequences: list[ReadSequence] = []
    skipped = Skipped()
    files = tuple(files)
    line: Mapping[str, Any] | None = None
    seen: Seen = set()
    for recorded in (entry for file in files for entry in read_recorded(file)):
        if isinstance(recorded, FailedLine):
            skipped.failed_lines += 1
            continue
        if recorded.line is not line:
            line, seen = recorded.line, set()
        require_fits(recorded, accepted.digests, accepted.vocab_size, accepted.positions)
        scored = [_is_scored(turn, recorded, accepted, skipped, seen) for turn in recorded.turns]
        if any(scored):
            sequences.append(_sequence(recorded, scored))
        else:
            skipped.empty += 1
    if not sequences:
        raise _nothing_left(files, skipped, accepted)
    return tuple(sequences), skipped


def _is_scored(
    turn: RecordedTurn, recorded: RecordedTrajectory, accepted: Accepted, skipped: Skipped, seen: Seen
) -> bool:
    """True if a turn is scored; counts it if not.

    Args:
        seen: the turns of this line's trajectories so far.
    """
    if turn.digest is not None and turn.digest not in accepted.known(turn.agent):
        skipped.other_adapters[turn.agent] += 1
        skipped.digests.setdefault(turn.agent, set()).add(turn.digest)
        return False
    if turn.truncated:
        skipped.truncated += 1
        return False
    key = (turn.agent, recorded.token_ids[: turn.end])
    if key in seen:
        skipped.repeated += 1
        return False
    seen.add(key)
    return True


def _sequence(recorded: RecordedTrajectory, scored: Sequence[bool]) -> ReadSequence:
    used = max(index for index, flag in enumerate(scored) if flag) + 1
    turns = tuple(Turn(turn.agent, turn.start, turn.end) for turn in recorded.turns[:used])
    flags = tuple(scored[:used])
    return ReadSequence(
        TurnSequence(recorded.token_ids[: turns[-1].end], turns),
        flags,
        gold=any(turn.digest is None for turn in recorded.turns),
        logprobs=_logprobs(recorded, turns, flags),
        place=recorded.place,
        line=recorded.line,
    )


def _logprobs(recorded: RecordedTrajectory, turns: Sequence[Turn], scored: Sequence[bool]) -> tuple[float, ...]:
    if not recorded.logprobs:
        return ()
    used = [turn for turn, flag in zip(turns, scored, strict=True) if flag]
    found = [value for turn in used for value in recorded.logprobs[turn.start : turn.end]]
    known = tuple(value for value in found if value is not None)
    return known if len(known) == len(found) else ()


def _nothing_left(files: Sequence[Path], skipped: Skipped, accepted: Accepted) -> TaskFileError:
    reasons = "; ".join(skipped.sentences()) or "there is no trajectory"
    message = f"{', '.join(map(str, files))}: no turn counts: {reasons}"
    if not skipped.digests:
        return TaskFileError(message, "Roll out tasks that succeed, under non_shared.")
    agent, found = next(iter(skipped.digests.items()))
    expected = " or ".join(sorted(digest[:12] for digest in accepted.known(agent)))
    return TaskFileError(
        f"{message}; adapter {agent} has digest {expected}, the file has "
        f"{', '.join(sorted(digest[:12] for digest in found))}",
        "Give the adapters that rolled the tasks out, in the run's dtype.",
    )
