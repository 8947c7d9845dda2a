"""Options and result of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Literal, TypedDict

from lragent.errors import RequestError
from lragent.runtime.usage import Usage

FinishReason = Literal["stop", "length"]


class TurnArguments(TypedDict, total=False):
    """Keyword arguments of `Trajectory.generate`: the fields of `TurnOptions`, each optional."""

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    ignore_eos: bool
    forced: Sequence[int] | None


@dataclass(frozen=True)
class TurnOptions:
    """Sampling and stop options of a turn.

    Args:
        max_new_tokens: maximum number of tokens; ignored with `forced`.
        stop: strings (or one string) that end the turn; `Turn.text` leaves them out.
        stop_token_ids: token ids that end the turn, besides the model's own stop tokens.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters, applied in this order after temperature; 0, 1.0 and 0.0 are off.
        seed: a sample depends on seed, position and logits only.
        ignore_eos: the model's own stop tokens don't end the turn; `stop_token_ids` still do.
        forced: tokens to take instead of sampling; their log-probabilities are returned, stops don't apply.
    """

    max_new_tokens: int = 64
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    forced: Sequence[int] | None = None

    def __post_init__(self) -> None:
        checks = (
            (hasattr(self.max_new_tokens, "__index__"), f"max_new_tokens is {self.max_new_tokens!r}, no whole number"),
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, must be at least 1"),
            (self.temperature >= 0, f"temperature is {self.temperature}, must not be negative"),
            (self.top_k >= 0, f"top_k is {self.top_k}, must not be negative (0 is off)"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}, must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min_p is {self.min_p}, must be between 0 and 1"),
            (self.forced is None or len(self.forced) > 0, "forced is empty, give at least one token"),
            (all(self.stop_strings), "stop contains an empty string"),
        )
        for holds, message in checks:
            if not holds:
                raise RequestError(message)

    @staticmethod
    def of(arguments: TurnArguments) -> TurnOptions:
        """Options from keyword arguments.

        Raises:
            RequestError: an unknown option or a bad value.
        """
        known = [field.name for field in fields(TurnOptions)]
        for name in arguments:
            if name not in known:
                raise RequestError(f"unknown turn option {name!r}", f"Options are: {', '.join(known)}.")
        return TurnOptions(**arguments)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def length(self) -> int:
        """Maximum number of tokens of the turn."""
        return self.max_new_tokens if self.forced is None else len(self.forced)


@dataclass(frozen=True)
class Turn:
    """Result of a turn.

    Args:
        token_ids: every sampled token, a stop token included.
        text: decoded text without stop string and special tokens; empty if the engine has no tokenizer. A leading space
            is kept. U+FFFD stands for bytes at its end that are no complete character.
        logprobs: natural log-probability of each token under the unfiltered distribution.
        finish_reason: "stop" (a stop string or token) or "length" (max_new_tokens, or the model's last position).
        stop_reason: the stop string or the token id that ended the turn; None if its length did.
    """

    agent: str
    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: FinishReason
    usage: Usage
    stop_reason: str | int | None = None


def as_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids as a list of int, checked.

    Raises:
        RequestError: not a sequence of whole numbers, or an id outside the vocabulary.
    """
    try:
        listed = [index(token) for token in ids]
    except TypeError as error:
        raise RequestError(f"token ids must be a sequence of whole numbers: {error}") from error
    for token in listed:
        if not 0 <= token < vocab_size:
            raise RequestError(f"token id {token} is outside the vocabulary of {vocab_size} tokens")
    return listed
