"""The file of a workflow and the modules that it imports from its folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from lragent.files.checked_file import sha256_of

_OWN_FOLDER = Path(__file__).resolve().parents[1]  # the folder of lragent


def module_root(path: Path) -> tuple[Path, str]:
    """The folder that must be on `sys.path`, and the file's dotted name below it."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    return root, ".".join(parts)


def files_of(file: Path) -> dict[str, str]:
    """Hashes of a file and of all modules that it imports, directly or not, from its folder.

    The folder of a module of a package is that of the outermost package.
    """
    root, name = module_root(file)
    folder = root / name.split(".")[0] if "." in name else root
    seen: dict[str, str] = {}
    left = [file, *_found(root, name)]
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
