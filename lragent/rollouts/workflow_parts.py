"""The parts of a workflow: its function, and its file and the modules that it imports from its folder, by hash."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import marshal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent.files.checked_file import sha256_of
from lragent.rollouts.workflow_loading import module_root, parse_spec

if TYPE_CHECKING:
    from lragent.runtime import Workflow

FUNCTION = "function"
_OWN_FOLDER = Path(__file__).resolve().parents[1]  # the folder of lragent


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
        return {FUNCTION: f"{file.name}:{name}", **_files(file.resolve())}
    function = _plain(workflow)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    found = _source_file(function)
    if found is None:
        return {FUNCTION: name, "code": hashlib.sha256(_code(function)).hexdigest()}
    return {FUNCTION: f"{found.name}:{name}", **_files(found)}


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


def _files(file: Path) -> dict[str, str]:
    """Hashes of a file and of all modules that it imports, directly or not, from its folder.

    The folder of a module of a package is that of the outermost package.
    """
    root, name = module_root(file)
    folder = root / name.split(".")[0] if "." in name else root
    seen: dict[str, str] = {}
    left = [file]
    while left:
        path = left.pop()
        relative = path.relative_to(root).as_posix()
        ours = path.is_relative_to(folder) and not path.is_relative_to(_OWN_FOLDER)
        if (ours or path == file) and relative not in seen:
            seen[relative] = sha256_of(path)
            for module in _imported(path, root):
                left += _found(root, module)
    return dict(sorted(seen.items()))


def _imported(path: Path, root: Path) -> Iterator[str]:
    """Dotted names in the import statements of a file; of `from a import b` both `a` and `a.b`."""
    package = path.relative_to(root).parent.parts
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a file that is imported in a `try` only
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= len(package):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *([node.module] if node.module else [])))
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def _found(root: Path, module: str) -> Iterator[Path]:
    """Files of a module and of the packages that it is in, where they lie below `root`."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                yield file
