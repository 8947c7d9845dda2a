"""Examples: sequences with their weights in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lragent.errors import TaskFileError
from lragent.training.turn_sequence import TurnSequence
from lragent.tuning.options import TuneOptions
from lragent.tuning.read_sequences import ReadSequence


@dataclass(frozen=True)
class Example:
    """One trajectory.

    Args:
        scored: by turn of the sequence, True if its tokens are in the loss. The others are only read.
        scored_tokens: their number.
        kl, cross_entropy: weights of its tokens in the loss.
        logprobs: recorded log-probabilities of the scored tokens, in order; empty if there are none.
        place: file and line, for messages.
    """

    sequence: TurnSequence
    scored: tuple[bool, ...]
    scored_tokens: int
    kl: float
    cross_entropy: float
    logprobs: tuple[float, ...]
    place: str

    @property
    def tokens(self) -> int:
        """Tokens that run through the model."""
        return self.sequence.turns[-1].end


def examples_of(sequences: Sequence[ReadSequence], options: TuneOptions) -> tuple[Example, ...]:
    """Gives each sequence its weights in the loss; those of weight 0 are left out.

    Raises:
        TaskFileError: a weight is no number, or below 0; or nothing has a weight.
    """
    examples = []
    for read in sequences:
        kl, cross_entropy = options.loss_weights(read.gold)
        if cross_entropy:
            cross_entropy *= _line_weight(read, options.weight_field)
        if kl or cross_entropy:
            examples.append(
                Example(read.sequence, read.scored, read.scored_tokens, kl, cross_entropy, read.logprobs, read.place)
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
