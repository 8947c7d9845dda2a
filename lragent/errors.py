"""Error types: `UserError` for problems that the user can fix, `InternalError` for defects of this project.

Every `UserError` says what was found, where, and what to do. The CLI prints it with its hint and exits with code 1. An
`InternalError` keeps its traceback.
"""

from dataclasses import dataclass

MOST_SHOWN = 300

# Exceptions that stop a process or a generator; they are no errors of the code that raises them.
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def shortened(error: BaseException) -> str:
    """Text of a library's error on one line, cut to `MOST_SHOWN` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


class LRAgentError(Exception):
    """Root of all errors raised by this package."""


class UserError(LRAgentError):
    """A problem in the caller's input or environment.

    Args:
        message: the finding and its place.
        hint: a sentence on how to fix it; shown after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


class ModelError(UserError):
    """A model directory or a live model that can't be read or captured."""


class AdapterError(UserError):
    """An adapter that is missing, damaged, trained on another base, or of an unsupported kind."""


@dataclass(frozen=True)
class Miss:
    """A place in a graph where a pass should match but does not.

    Args:
        where: module FQN or layer.
        node: name of the graph node.
        reason: cause of the miss.
    """

    where: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} (node {self.node})"


class SplitRefused(UserError):
    """An adapter that can't be routed, or a layer whose K or V can't be split into a base and a low-rank stream.

    Args:
        misses: all refused places; the message names the first few.
    """

    def __init__(self, message: str, hint: str = "", misses: tuple[Miss, ...] = ()) -> None:
        super().__init__(message, hint)
        self.misses = misses


class ArtifactError(UserError):
    """An artifact that is missing, damaged, of another version, or compiled for another machine."""


class CompilerMissing(UserError):
    """A C++ compiler is needed but none was found."""


class NoSpace(UserError):
    """No disk space for a compiler's temporary files."""


class RequestError(UserError):
    """A call that the engine can't serve: unknown agent, prompt too long, turn in progress, bad argument."""


class CacheMemoryError(RequestError):
    """A cache that is too small or can't be allocated, or a trajectory that doesn't fit into it even alone."""


class TaskFileError(UserError):
    """A task file or workflow that can't be read."""


class TuneError(UserError):
    """A tuning run that can't start or go on: its folder, too little memory, a loss that is NaN."""


class InternalError(LRAgentError):
    """A broken invariant of this project. Please report it."""
