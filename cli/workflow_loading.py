"""Loads a workflow, `async def workflow(task, t) -> dict`, from `FILE.py:FUNC`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lragent.errors import TaskFileError

Workflow = Callable[[dict[str, Any], Any], Awaitable[dict[str, Any]]]

SIGNATURE = "async def workflow(task, t) -> dict"


def load_workflow(spec: str) -> Workflow:
    """The function that `FILE.py:FUNC` names.

    Raises:
        TaskFileError: no such file or function, the file can't be imported, or the function isn't a workflow.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise TaskFileError(f"workflow {spec!r} isn't FILE.py:FUNC", "For example workflows/qa.py:workflow.")
    path = Path(file)
    if not path.is_file():
        raise TaskFileError(f"workflow file {path} isn't there", "Check the path before the colon.")
    module = _import_file(path)
    function = getattr(module, name, None)
    if function is None:
        found = [n for n, value in vars(module).items() if inspect.iscoroutinefunction(value)]
        raise TaskFileError(
            f"{path} has no {name!r}", f"Async functions there: {', '.join(found)}." if found else f"Write {SIGNATURE}."
        )
    if not inspect.iscoroutinefunction(function):
        kind = "a plain function" if inspect.isfunction(function) else f"of type {type(function).__name__}"
        raise TaskFileError(f"{path}:{name} is {kind}, not an async function", f"Write {SIGNATURE}.")
    try:
        inspect.signature(function).bind({}, None)
    except TypeError as error:
        raise TaskFileError(
            f"{path}:{name}{inspect.signature(function)} can't be called with a task and a trajectory",
            f"Write {SIGNATURE}.",
        ) from error
    workflow: Workflow = function
    return workflow


def _import_file(path: Path) -> ModuleType:
    """Imports a file by its place in its package, or by itself if its folder is none."""
    root, name = _module_name(path.resolve())
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise TaskFileError(
            f"{path}{_line_in(path, error)} raised {type(error).__name__} when imported: {error}",
            "Mend the file and try again.",
        ) from error
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise TaskFileError(
            f"{path} can't be imported: Python has another module named {name!r} at {module.__file__ or 'its own'}",
            "Rename the file.",
        )
    return module


def _module_name(path: Path) -> tuple[Path, str]:
    """Folder that has to be on `sys.path`, and the dotted name below it."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    return root, ".".join(parts)


def _line_in(path: Path, error: BaseException) -> str:
    """The innermost line of the file that the error passed through, as a remark."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return f" line {lines[-1]}" if lines else ""
