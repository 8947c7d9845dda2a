"""Loads a workflow, `async def workflow(task, t) -> dict`, from `FILE.py:FUNC`."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lragent.errors import TaskFileError
from lragent.files.user_path import user_path
from lragent.rollouts.workflow_files import files_of, module_root

if TYPE_CHECKING:
    from lragent.runtime import Workflow

SIGNATURE = "async def workflow(task, t) -> dict"
_FILES = "__lragent_files__"  # attribute of a workflow's module


@contextmanager
def open_workflow(spec: str) -> Iterator[Workflow]:
    """Imports the function that `FILE.py:FUNC` names, and yields it.

    The file's folder (for a module of a package, the folder above the package) is on `sys.path` until the block ends,
    because a workflow may import its neighbours while it runs.

    Raises:
        TaskFileError: there is no such file or function, the import fails, or the function isn't a workflow.
    """
    path, name = parse_spec(spec)
    root, module_name = module_root(path.resolve())
    with _on_path(root):
        _forget_if_changed(path.resolve(), root, module_name)
        yield _function(_import_file(path, module_name), path, name)


def parse_spec(spec: str) -> tuple[Path, str]:
    """File and function of "FILE.py:FUNC".

    Raises:
        TaskFileError: the text has another form, or there is no such file.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise TaskFileError(f"workflow {spec!r} isn't FILE.py:FUNC", "For example workflows/qa.py:workflow.")
    path = user_path(file)
    if not path.is_file():
        raise TaskFileError(f"workflow file {path} doesn't exist", "Check the path before the colon.")
    return path, name


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Puts a folder first on `sys.path` until the block ends, unless it is there already."""
    entry = str(folder)
    added = entry not in sys.path
    if added:
        sys.path.insert(0, entry)
    try:
        yield
    finally:
        if added and entry in sys.path:
            sys.path.remove(entry)


def _forget_if_changed(path: Path, root: Path, name: str) -> None:
    """Makes Python import a workflow and its modules anew if a file has changed since this function was called before.

    A module remembers the hashes of its files, so that a session runs the file that the results are bound to.
    """
    files = files_of(path)
    module = sys.modules.get(name)
    if module is not None and getattr(module, _FILES, files) != files:
        paths = {str(root / relative) for relative in (*getattr(module, _FILES), *files)}
        for other, loaded in list(sys.modules.items()):
            if getattr(loaded, "__file__", None) in paths:
                del sys.modules[other]
        importlib.invalidate_caches()


def _function(module: ModuleType, path: Path, name: str) -> Workflow:
    """A module's workflow by name.

    Raises:
        TaskFileError: there is no such function, or it isn't a workflow.
    """
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


def _import_file(path: Path, name: str) -> ModuleType:
    """Imports a file by its dotted name.

    Raises:
        TaskFileError: the import fails, or Python has another module of this name.
    """
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise TaskFileError(
            f"{path}{_line_in(path, error)} raised {type(error).__name__} when imported: {error}",
            "Repair the file and try again.",
        ) from error
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise TaskFileError(
            f"{path} can't be imported: Python has another module named {name!r} at {module.__file__ or 'its own'}",
            "Rename the file.",
        )
    setattr(module, _FILES, files_of(path.resolve()))
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """The innermost line of the file in an error's traceback, as text; "" if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return f" line {lines[-1]}" if lines else ""
