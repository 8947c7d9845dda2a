"""The exception that ended a task, as text that a result can hold."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from lragent.errors import STOPS

MOST_CHARACTERS = 10_000  # of a message; of a traceback, its last ones
MOST_CAUSES = 50


@dataclass(frozen=True)
class ErrorCause:
    """An exception behind another one."""

    type: str
    message: str


@dataclass(frozen=True)
class TaskError:
    """An exception that a workflow raised.

    Args:
        type: name of its class.
        message: its text; that of an ExceptionGroup names the exceptions in it.
        traceback: Python's traceback from the workflow on, the causes included; "" if there is none.
        causes: exceptions in a group, and those that were being handled (`__cause__`, `__context__`), each followed by
            its own causes.
    """

    type: str
    message: str
    traceback: str = ""
    causes: tuple[ErrorCause, ...] = ()


def task_error(raised: BaseException, trace: TracebackType | None) -> TaskError:
    """The error of a task that ended with an exception; never raises an error of the exception's own methods.

    Args:
        trace: traceback from the first frame to show.
    """
    message = _text(raised)
    inside = [f"{type(error).__name__}: {_text(error)}" for error in _leaves(raised)]
    if inside:
        message = f"{message}: {'; '.join(inside)}"
    causes = tuple(ErrorCause(type(error).__name__, _start(_text(error))) for error in _behind(raised))
    return TaskError(type(raised).__name__, _start(message), _lines(raised, trace), causes)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except STOPS:
        raise
    except BaseException as failed:
        return f"(no text: its str() raised {type(failed).__name__})"


def _start(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _lines(error: BaseException, trace: TracebackType | None) -> str:
    text = "".join(traceback.format_exception(type(error), error, trace))
    return text if len(text) <= MOST_CHARACTERS else f"...{text[3 - MOST_CHARACTERS :]}"


def _members(error: BaseException) -> tuple[BaseException, ...]:
    """Exceptions in a group; () for any other exception. Python 3.10 has no groups of its own, only libraries'."""
    members = getattr(error, "exceptions", ())
    if not isinstance(members, (tuple, list)):
        return ()
    return tuple(member for member in members if isinstance(member, BaseException))


def _leaves(group: BaseException) -> Iterator[BaseException]:
    """The first exceptions of a group that are no groups."""
    found, left = 0, list(reversed(_members(group)))
    while left and found < MOST_CAUSES:
        error = left.pop()
        inner = _members(error)
        left += reversed(inner)
        if not inner:
            found += 1
            yield error


def _behind(raised: BaseException) -> Iterator[BaseException]:
    """The first exceptions behind one, each once, depth first."""
    known, left = {id(raised)}, list(reversed(_causes(raised)))
    while left and len(known) <= MOST_CAUSES:
        error = left.pop()
        if id(error) not in known:
            known.add(id(error))
            left += reversed(_causes(error))
            yield error


def _causes(error: BaseException) -> tuple[BaseException, ...]:
    handled = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _members(error) if handled is None else (*_members(error), handled)
