"""Options and result of a turn."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Real
from operator import index
from typing import Any, Literal, TypedDict

from lragent.errors import RequestError
from lragent.runtime.usage import Usage

FinishReason = Literal["stop", "length"]


# Options for which None means the default, as in other libraries.
NONE_IS_DEFAULT = ("stop", "stop_token_ids", "temperature", "top_k", "top_p", "min_p", "seed", "forced")


class TurnArguments(TypedDict, total=False):
    """Keyword arguments of `Trajectory.generate`: the fields of `TurnOptions`, each optional."""

    max_new_tokens: int
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
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
        seed: a sample depends on seed, position and logits only. None: a seed of the turn's own (runtime/seeds.py).
        ignore_eos: the model's own stop tokens don't end the turn; `stop_token_ids` still do.
        forced: tokens to take instead of sampling; their log-probabilities are returned, stops don't apply.

    Raises:
        RequestError: a value of another type, or outside its range.
    """

    max_new_tokens: int = 64
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    forced: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k"):
            self._require(name, "a whole number", _is_whole)
        self._require("seed", "a whole number", lambda value: value is None or _is_whole(value))
        for name in ("temperature", "top_p", "min_p"):
            self._require(name, "a finite number", _is_number)
        self._require("stop", "a string or strings", lambda value: _are_all(_is_text, value))
        self._require("stop_token_ids", "whole numbers", lambda value: _are_all(_is_whole, value))
        self._require("ignore_eos", "True or False", lambda value: isinstance(value, bool))
        self._require("forced", "a sequence of token ids", lambda value: value is None or isinstance(value, Collection))
        checks = (
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

    def _require(self, name: str, kind: str, check: Callable[[Any], bool]) -> None:
        """Raises RequestError if the value of an option is not of a kind."""
        value = getattr(self, name)
        if not check(value):
            raise RequestError(f"{name} is {reprlib.repr(value)}, must be {kind}")

    @staticmethod
    def of(arguments: TurnArguments) -> TurnOptions:
        """Options from keyword arguments; None is the default of those in `NONE_IS_DEFAULT`.

        Raises:
            RequestError: an unknown option or a bad value.
        """
        known = [field.name for field in fields(TurnOptions)]
        for name in arguments:
            if name not in known:
                raise RequestError(f"unknown turn option {name!r}", f"Options are: {', '.join(known)}.")
        given: dict[str, Any] = {
            name: value for name, value in arguments.items() if value is not None or name not in NONE_IS_DEFAULT
        }
        return TurnOptions(**given)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(map(index, self.stop_token_ids))

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
        sampled_logprobs: natural log-probability of each token under the distribution it was drawn from, after
            temperature and filters; 0 for a greedy token, None for a forced one.
        kept_mass: by token, the probability at the turn's temperature of all tokens that the filters kept; None for a
            forced token.
        seed: the seed that the turn was sampled with.
        stop_reason: the stop string or token id that ended the turn; None if none did.
    """

    agent: str
    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: FinishReason
    usage: Usage
    sampled_logprobs: list[float | None] = field(default_factory=list)
    kept_mass: list[float | None] = field(default_factory=list)
    seed: int = 0
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


def _is_whole(value: object) -> bool:
    try:
        index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_all(check: Callable[[object], bool], values: object) -> bool:
    """True for a string, or for a collection of which each element passes the check."""
    if isinstance(values, str):
        return check(values)
    return isinstance(values, Collection) and not isinstance(values, bytes) and all(map(check, values))
