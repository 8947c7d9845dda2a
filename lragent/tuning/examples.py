"""Examples: sequences with their weights in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lragent.errors import TaskFileError
from lragent.training.turn_sequence import Turn, TurnSequence
from lragent.tuning.options import TuneOptions
from lragent.tuning.read_sequences import ReadSequence


@dataclass(frozen=True)
class Example:
    """One trajectory.

    Args:
        scored: by turn of the sequence, True if its tokens are in the loss. The others are only read.
        kl, cross_entropy: weights of its tokens in the loss.
        logprobs: recorded log-probabilities of the generated tokens of scored turns, in order; empty if there are none.
        place: file and line, for messages.
        appended_kl: weight of KL of the tokens that were appended before scored turns, each as the turn's agent
            predicts it; 0 leaves them out of the loss.
    """

    sequence: TurnSequence
    scored: tuple[bool, ...]
    kl: float
    cross_entropy: float
    logprobs: tuple[float, ...]
    place: str
    appended_kl: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that run through the model."""
        return self.sequence.turns[-1].end

    @property
    def predicted(self) -> TurnSequence:
        """The sequence with turns that hold all tokens in the loss: appended ones lead the turn before which they
        stand. Rows of a forward are those of the sequence itself; more of them predict.
        """
        turns = tuple(replace(turn, start=first) for first, turn in self._spans())
        return replace(self.sequence, turns=turns)

    @property
    def generated(self) -> tuple[bool, ...]:
        """For each token in the loss, in order, True if it was generated, False if it was appended."""
        scored = [span for span, flag in zip(self._spans(), self.scored, strict=True) if flag]
        return tuple(at >= turn.start for first, turn in scored for at in range(first, turn.end))

    def without_appended(self) -> Example:
        """The example with generated tokens alone in the loss."""
        return replace(self, appended_kl=0.0)

    def _spans(self) -> Iterator[tuple[int, Turn]]:
        """Each turn with its first token in the loss; the first token of a sequence is predicted by none."""
        end = 1
        for turn, flag in zip(self.sequence.turns, self.scored, strict=True):
            yield (end if flag and self.appended_kl else turn.start), turn
            end = turn.end


def examples_of(sequences: Sequence[ReadSequence], options: TuneOptions, scheme: str) -> tuple[Example, ...]:
    """Gives each sequence its weights in the loss; those of weight 0 are left out.

    Args:
        scheme: the target scheme.

    Raises:
        TaskFileError: a weight is no number, or below 0; or nothing has a weight.
    """
    examples = []
    for read in sequences:
        kl, cross_entropy = options.loss_weights(read.gold)
        if cross_entropy:
            cross_entropy *= _line_weight(read, options.weight_field)
        if kl or cross_entropy:
            appended_kl = options.appended_weight(scheme) if kl else 0.0
            examples.append(
                Example(read.sequence, read.scored, kl, cross_entropy, read.logprobs, read.place, appended_kl)
            )
    if not examples:
        raise TaskFileError(
            f"{sequences[0].place} and all other trajectories have weight 0 in the loss",
            "Give a weight of KL (--kl) or cross-entropy (--cross-entropy), and lines with a reward above 0.",
        )
    return tuple(examples)


def _line_weight(read: ReadSequence, name: str | None) -> float:
    """The weight of a line's cross-entropy: the number at `name`; the reward, or 1 without one, if `name` is None."""
    value: Any = read.line
    for part in (name or "reward").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None and name is None:
        return 1.0
    if not isinstance(value, bool | int | float):
        raise TaskFileError(
            f"{read.place}: {name or 'reward'} is {value!r}, not a number",
            "Name an entry of every line with a number, such as result.score (--weight-field).",
        )
    if not 0 <= value < float("inf"):
        raise TaskFileError(
            f"{read.place}: {name or 'reward'} is {value}, which can't weigh a cross-entropy",
            "Name an entry with numbers from 0 on (--weight-field), or leave --cross-entropy out.",
        )
    return float(value)
