"""Reads the trajectories of a result file (docs/results.md), or of a gold file.

A line of a gold file has `token_ids` and `generated` only, and its digests are null: nobody rolled it out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lragent.errors import TaskFileError
from lragent.program.agent import BASE
from lragent.rollouts.jsonl import numbered_lines, parse_object
from lragent.rollouts.result_lines import FORMAT

_HINT = "Give a file that `lragent rollout` wrote, or lines with token_ids and generated (docs/results.md)."
_OTHER_MODEL = "Give the model that rolled them out, or trajectories of this one."


@dataclass(frozen=True)
class RecordedTurn:
    """Tokens `[start, end)` that an agent generated.

    Args:
        digest: of the agent's adapter; None in a gold file.
        truncated: True if tokens at its end were removed later.
    """

    agent: str
    digest: str | None
    start: int
    end: int
    truncated: bool


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory of a line.

    Args:
        place: file and line, for messages.
        logprobs: per token, as recorded; empty in a gold file.
        line: the line's object.
    """

    place: str
    token_ids: tuple[int, ...]
    turns: tuple[RecordedTurn, ...]
    logprobs: tuple[float | None, ...]
    line: Mapping[str, Any]

    @property
    def end(self) -> int:
        """End of the last turn, 0 without turns: no agent has read its last token, nor those behind it."""
        return self.turns[-1].end if self.turns else 0


@dataclass(frozen=True)
class FailedLine:
    """A line whose task ended in an error."""

    place: str


def read_recorded(path: Path) -> Iterator[RecordedTrajectory | FailedLine]:
    """Yields the trajectories of a file in order, and its failed lines. A torn last line is left out.

    Raises:
        TaskFileError: the file can't be read, or a line has no trajectory, another format, or spans that don't fit; the
            message names file and line.
    """
    for number, line in numbered_lines(path):
        if not line.endswith(b"\n") and not _is_whole(path, number, line):
            continue
        value = parse_object(path, number, line)
        place = f"{path} line {number}"
        if value.get("error") is not None:
            yield FailedLine(place)
            continue
        if "trajectories" not in value:
            yield _trajectory(place, value, value)
            continue
        if value.get("format") != FORMAT:
            _refuse(place, f"has format {value.get('format')!r}, this lragent reads {FORMAT}")
        entries = value["trajectories"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            _refuse(place, '"trajectories" is not a list of objects')
        for entry in entries:
            yield _trajectory(place, entry, value)


def require_fits(recorded: RecordedTrajectory, agents: Collection[str], vocab_size: int, positions: int) -> None:
    """Checks a trajectory against a model and its agents.

    Args:
        agents: names besides `base`.
        vocab_size: ids of the model are below it.
        positions: largest number of tokens that an agent can have read when it generated another one.

    Raises:
        TaskFileError: an unknown agent, a token outside the vocabulary, or too many tokens.
    """
    for turn in recorded.turns:
        if turn.agent not in agents and turn.agent != BASE:
            raise TaskFileError(
                f"{recorded.place}: a turn is of an unknown agent, {turn.agent!r}",
                f"The agents here are {', '.join((*agents, BASE))}. Name them as the trajectories do.",
            )
    largest = max(recorded.token_ids, default=0)
    if largest >= vocab_size:
        raise TaskFileError(
            f"{recorded.place}: token id {largest} is outside the model's vocabulary of {vocab_size} tokens",
            f"The trajectories are of another tokenizer. {_OTHER_MODEL}",
        )
    if recorded.end - 1 > positions:
        raise TaskFileError(
            f"{recorded.place}: its agents read {recorded.end - 1} tokens, the model has {positions} positions",
            _OTHER_MODEL,
        )


def _is_whole(path: Path, number: int, line: bytes) -> bool:
    """True for a last line without a newline that is an object: people write such files, killed runs don't."""
    try:
        parse_object(path, number, line)
    except TaskFileError:
        return False
    return True


def _trajectory(place: str, entry: Mapping[str, Any], line: Mapping[str, Any]) -> RecordedTrajectory:
    tokens = entry.get("token_ids")
    if not isinstance(tokens, list) or not all(_is_count(token) for token in tokens):
        _refuse(place, '"token_ids" is not a list of whole numbers')
    spans = entry.get("generated")
    if not isinstance(spans, list):
        _refuse(place, '"generated" is not a list of spans')
    reasons = entry.get("finish_reasons") or [None] * len(spans)
    logprobs = entry.get("logprobs") or []
    if not isinstance(reasons, list) or len(reasons) != len(spans):
        _refuse(place, f"has {len(spans)} spans, and finish_reasons of another length")
    if not isinstance(logprobs, list) or len(logprobs) not in (0, len(tokens)):
        _refuse(place, f"has {len(tokens)} tokens, and logprobs of another length")
    turns = []
    last = 1  # the first token is never generated: an agent needs one to begin with
    for span, reason in zip(spans, reasons, strict=True):
        turn = _turn(place, span, truncated=reason == "truncated")
        if turn.start == turn.end:
            continue  # truncate removed all of it
        if not last <= turn.start < turn.end <= len(tokens):
            _refuse(place, f"the span {span} does not fit: tokens {last} to {len(tokens)} are left for it")
        last = turn.end
        turns.append(turn)
    return RecordedTrajectory(place, tuple(tokens), tuple(turns), tuple(logprobs), line)


def _turn(place: str, span: Any, truncated: bool) -> RecordedTurn:
    if not isinstance(span, list) or len(span) != 4:
        _refuse(place, f"the span {span!r} is not [agent, digest, start, end]")
    agent, digest, start, end = span
    if not isinstance(agent, str) or not (digest is None or isinstance(digest, str)):
        _refuse(place, f"the span {span!r} names no agent and digest")
    if not _is_count(start) or not _is_count(end):
        _refuse(place, f"the span {span!r} has no positions")
    return RecordedTurn(agent, digest, start, end, truncated)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse(place: str, found: str) -> NoReturn:
    raise TaskFileError(f"{place}: {found}", _HINT)
