"""The parts of a workflow: its function, and its file and the modules that it imports from its folder, by hash."""

from __future__ import annotations

import functools
import hashlib
import inspect
import marshal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent.rollouts.workflow_files import files_of
from lragent.rollouts.workflow_loading import parse_spec

if TYPE_CHECKING:
    from lragent.runtime import Workflow

FUNCTION = "function"


def workflow_parts(workflow: Workflow | str) -> dict[str, str]:
    """The parts of a workflow by name: "function", and the path of each file relative to the workflow's folder.

    Modules are found by the import statements of the files, wherever they stand. A module that is imported in another
    way is not a part. A function that is in no file (of an interactive session) has the part "code".

    Args:
        workflow: the function, or "FILE.py:FUNC".

    Raises:
        TaskFileError: there is no such file.
    """
    if isinstance(workflow, str):
        file, name = parse_spec(workflow)
        return {FUNCTION: f"{file.name}:{name}", **files_of(file.resolve())}
    function = _plain(workflow)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    found = _source_file(function)
    if found is None:
        return {FUNCTION: name, "code": hashlib.sha256(_code(function)).hexdigest()}
    return {FUNCTION: f"{found.name}:{name}", **files_of(found)}


def _plain(function: Any) -> Any:
    """The function behind wrappers and partial functions; for an object that is called, its class."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    return function if hasattr(function, "__code__") or inspect.ismethod(function) else type(function)


def _source_file(function: Callable[..., Any]) -> Path | None:
    try:
        file = inspect.getsourcefile(function)
    except TypeError:  # of a class that has no file
        return None
    return Path(file).resolve() if file is not None and Path(file).is_file() else None


def _code(function: Any) -> bytes:
    try:
        return inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return b"" if code is None else marshal.dumps(code)
