"""Reads the trajectories of a result file as sequences of turns, for training and for measuring drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.errors import TaskFileError
from lragent.program.agent import BASE
from lragent.rollouts.jsonl import numbered_lines, parse_object
from lragent.runtime import TrajectoryRecord
from lragent.training.turn_sequence import Turn, TurnSequence

TRUNCATED = "truncated"  # finish reason of a turn whose end `Trajectory.truncate` removed


@dataclass(frozen=True)
class Skipped:
    """Numbers of what a result file holds and nobody reads.

    Args:
        errors: lines whose task failed.
        truncated: turns whose end was removed.
        other_adapters: turns of adapters with another digest.
        without_turns: trajectories in which no turn is left.
    """

    errors: int = 0
    truncated: int = 0
    other_adapters: int = 0
    without_turns: int = 0

    def in_words(self) -> str:
        """A sentence without its end, or "" if nothing was skipped."""
        kinds = (
            (self.errors, "lines of failed tasks"),
            (self.truncated, "truncated turns"),
            (self.other_adapters, "turns of other adapters"),
            (self.without_turns, "trajectories without turns"),
        )
        return ", ".join(f"{count} {name}" for count, name in kinds if count)


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of a result file.

    Args:
        lines: number of each sequence's line in the file, from 1.
        other_adapters: number of turns among them that adapters with another digest generated.
    """

    sequences: tuple[TurnSequence, ...]
    lines: tuple[int, ...]
    skipped: Skipped
    other_adapters: int = 0


def read_turn_sequences(
    path: Path, agents: Mapping[str, str], vocab_size: int, other_adapters: bool = False
) -> Trajectories:
    """Reads all trajectories with turns; see docs/results.md for the format.

    A line needs `trajectories` with `token_ids` and `generated` only. A digest that is null (text that no adapter
    generated) fits every adapter.

    Args:
        agents: name -> digest of its adapter.
        vocab_size: ids of the model are below it.
        other_adapters: True to take turns whose adapter has another digest, too.

    Raises:
        TaskFileError: the file can't be read; a line has another form, names an unknown agent, or has ids outside the
            vocabulary; no trajectory is left.
    """
    sequences: list[TurnSequence] = []
    lines: list[int] = []
    errors = truncated = others = skipped_others = empty = 0
    for number, line in _lines(path):
        if line.get("error") is not None:
            errors += 1
            continue
        for tokens, spans in _trajectories(path, number, line):
            turns: list[Turn] = []
            for span in spans:
                _require_known(path, number, span.turn.agent, agents)
                other = span.digest is not None and span.digest != agents.get(span.turn.agent, "")
                if span.truncated:
                    truncated += 1
                elif other and not other_adapters:
                    skipped_others += 1
                elif span.turn.start < span.turn.end:
                    turns.append(span.turn)
                    others += other
            _require_ids(path, number, tokens, vocab_size)
            if turns:
                sequences.append(TurnSequence(tuple(tokens), tuple(turns)))
                lines.append(number)
            else:
                empty += 1
    skipped = Skipped(errors, truncated, skipped_others, empty)
    if not sequences:
        found = skipped.in_words() or "it is empty"
        raise TaskFileError(
            f"{path} has no trajectory to read: {found}",
            "Give the results of a run with these adapters: `lragent rollout` writes them.",
        )
    return Trajectories(tuple(sequences), tuple(lines), skipped, others)


def sequence_of(record: TrajectoryRecord) -> TurnSequence | None:
    """A trajectory of a run in progress; None if no agent has generated a token that is left."""
    turns = tuple(Turn(span.agent, span.start, span.end) for span in record.generated if span.start < span.end)
    return TurnSequence(tuple(record.token_ids), turns) if turns else None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and objects of all lines; a last line that a killed run has left unfinished is left out.

    Raises:
        TaskFileError: the file can't be read, or another line is no JSON object.
    """
    for number, line in numbered_lines(path):
        try:
            value = parse_object(path, number, line)
        except TaskFileError:
            if line.endswith(b"\n"):
                raise
            return
        yield number, value


@dataclass(frozen=True)
class _Span:
    turn: Turn
    digest: str | None
    truncated: bool


def _trajectories(path: Path, number: int, line: Mapping[str, Any]) -> Iterator[tuple[list[int], list[_Span]]]:
    """Tokens and spans of each trajectory of a line.

    Raises:
        TaskFileError: the line has another form.
    """
    try:
        for trajectory in line["trajectories"]:
            tokens = [int(token) for token in trajectory["token_ids"]]
            reasons = trajectory.get("finish_reasons") or [""] * len(trajectory["generated"])
            spans = [
                _Span(Turn(str(agent), int(start), int(end)), digest, reason == TRUNCATED)
                for (agent, digest, start, end), reason in zip(trajectory["generated"], reasons, strict=True)
            ]
            yield tokens, spans
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TaskFileError(
            f"{path} line {number} is no result line: {type(error).__name__}: {error}",
            'A line has "trajectories", each with "token_ids" and "generated": [[agent, digest, start, end]].',
        ) from error


def _require_known(path: Path, number: int, agent: str, agents: Mapping[str, str]) -> None:
    if agent != BASE and agent not in agents:
        raise TaskFileError(
            f"{path} line {number}: a turn is of the agent {agent!r}", f"The agents are {', '.join((*agents, BASE))}."
        )


def _require_ids(path: Path, number: int, tokens: Sequence[int], vocab_size: int) -> None:
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise TaskFileError(
            f"{path} line {number}: token id {wrong}, the model has ids 0 to {vocab_size - 1}",
            "The trajectories are of another tokenizer. Roll out with this model.",
        )
