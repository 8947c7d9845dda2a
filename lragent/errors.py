"""Errors: what a user can mend (`UserError` and its kinds) apart from what only we can (`InternalError`).

Every `UserError` says what was found, where, and what to do; the CLI prints it on one line with its hint and exits
with code 1. An `InternalError` is a defect of this project and keeps its traceback.
"""

from dataclasses import dataclass

MOST_SHOWN = 300


def shortened(error: BaseException) -> str:
    """An error of a library as part of a sentence: on one line, and not without end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


class LRAgentError(Exception):
    """Root of all errors raised by this package."""


class UserError(LRAgentError):
    """Something in the caller's input or environment.

    Args:
        message: what was found and where.
        hint: what to do about it, as a sentence; shown after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


class ModelError(UserError):
    """A model directory or a live model that can't be read or captured."""


class AdapterError(UserError):
    """An adapter that is missing, broken, of another base, or of a kind that is not supported."""


@dataclass(frozen=True)
class Miss:
    """A place in a graph where a pass expected to match and could not."""

    where: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} (node {self.node})"


class SplitRefused(UserError):
    """An adapter that can't be routed, or a layer whose K or V can't be split into a base and a low-rank stream.

    Args:
        misses: every refused place; the message names the first few.
    """

    def __init__(self, message: str, hint: str = "", misses: tuple[Miss, ...] = ()) -> None:
        super().__init__(message, hint)
        self.misses = misses


class ArtifactError(UserError):
    """An artifact that is missing, damaged, of another version, or compiled for another machine."""


class CompilerMissing(UserError):
    """No C++ compiler where one is needed."""


class NoSpace(UserError):
    """No room on disk for the files that a compiler writes on the way."""


class RequestError(UserError):
    """A call that the engine can't serve: unknown agent, prompt too long, turn in progress, bad argument."""


class CacheMemoryError(RequestError):
    """A trajectory that can never fit into the cache memory it was given."""


class TaskFileError(UserError):
    """A task file or workflow that can't be read."""


class InternalError(LRAgentError):
    """A broken invariant of this project; please report it."""
