"""Rules about the tree that no reviewer should have to remember."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lragent.graph.passes import Pass
from lragent.kernels.implementations import IMPLEMENTATIONS
from lragent.passes import PASSES

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("lragent", "cli") for path in (ROOT / folder).rglob("*.py"))
WITH_BENCHMARKS = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
LRAGENT_SOURCES = [path for path in SOURCES if path.is_relative_to(ROOT / "lragent")]

# A room imports from rooms on lower floors only, so that rooms never import each other in a circle.
FLOORS = (
    {"errors"},
    {"files", "compat"},
    {"program"},
    {"probing", "text"},
    {"kernels", "loading", "runtime"},
    {"graph"},
    {"capture"},
    {"passes"},
    {"compile"},
    {"artifact"},
    {"training"},
    {"rollouts"},
    {"reports"},
    {"tuning"},
    {"api"},
    {"cli"},
)
FLAT_FILES = {"__init__.py", "api.py", "errors.py"}

ARCHITECTURE_NAMES = re.compile(
    r"llama|qwen|gemma|mi[sx]tral|gpt_?neo|gpt_?2|gpt_?oss|phi_?3|olmo|falcon|deepseek|cohere", re.IGNORECASE
)
MODULE_NAMES = re.compile(r"\b([qkvo]_proj|qkv_proj|c_attn|c_proj|query_key_value|lm_head|self_attn|embed_tokens)\b")
# Names of attention implementations, also as a part of the name of an op or graph; suffixes of files (.cpp) and
# settings of PyTorch (aot_inductor.) are not meant.
IMPLEMENTATION_NAMES = re.compile(r"(?<![.A-Za-z])(?<!aot_)(cpp|inductor)(?![A-Za-z])")
MOST_FILES = 3


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Folder of `lragent/`, "cli", or the name of a flat file; the package itself belongs to `api`."""
    top, _, rest = module.partition(".")
    return "cli" if top == "cli" else rest.partition(".")[0] or "api"


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, wherever in the file, also for type checkers only."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    known = {module_of(source) for source in SOURCES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in ("lragent", "cli"))
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], source]).rstrip(".")
            if source.split(".")[0] in ("lragent", "cli"):
                for alias in node.names:
                    yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source


def strings_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """String literals of a file; docstrings are free to name examples."""
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers and string literals of a file; docstrings and comments are free to name examples."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from strings_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    room = room_of(module_of(path))
    for imported in imports_of(path):
        below = room_of(imported)
        assert below == room or floor_of(below) < floor_of(room), f"{module_of(path)} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_of(path): set(imports_of(path)) - {module_of(path)} for path in SOURCES}
    TopologicalSorter(graph).prepare()


def test_every_room_has_a_floor_and_nothing_else_lies_flat() -> None:
    entries = {entry.name for entry in (ROOT / "lragent").iterdir() if entry.suffix == ".py"}
    assert entries == FLAT_FILES
    rooms = {path.parent.name for path in (ROOT / "lragent").glob("*/__init__.py")}
    assert rooms | {"errors", "api", "cli"} == set().union(*FLOORS)


@pytest.mark.parametrize("a_pass", PASSES, ids=lambda p: p.name)
def test_every_pass_has_a_test_file(a_pass: Pass) -> None:
    assert len(list((ROOT / "tests").glob(f"**/test_{a_pass.name}.py"))) == 1


@pytest.mark.parametrize("path", LRAGENT_SOURCES, ids=module_of)
def test_nothing_is_decided_by_the_name_of_a_model_or_of_a_module(path: Path) -> None:
    for line, word in words_of(path):
        assert word != "model_type", f"{module_of(path)} line {line} reads model_type"
        for names in (ARCHITECTURE_NAMES, MODULE_NAMES):
            assert not names.search(word), f"{module_of(path)} line {line} names {word!r}"


def test_attention_implementations_are_named_in_few_files() -> None:
    """A decision by an implementation's name belongs into the table `lragent/kernels/implementations.py`."""
    naming = {
        module_of(path)
        for path in LRAGENT_SOURCES
        for _, text in strings_of(ast.parse(path.read_text(encoding="utf-8")))
        if IMPLEMENTATION_NAMES.search(text)
    }
    assert "lragent.kernels.implementations" in naming
    assert len(naming) <= MOST_FILES, sorted(naming)


def test_every_folder_with_sources_is_installed() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert listed is not None
    native = [path for kind in ("*.cpp", "*.h") for path in (ROOT / "lragent").rglob(kind)]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (*SOURCES, *native)}
    assert set(ast.literal_eval(re.sub(r"#.*", "", listed[1]))) == folders - {"cli"} | {"lragent_cli"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_every_folder_with_code_is_a_package(path: Path) -> None:
    assert (path.parent / "__init__.py").is_file()


LIBRARIES = {"torch", "transformers", "peft"}
# Names of ops in captured graphs. A leading underscore is a part of an op's name: exported programs store it.
OP_NAMESPACES = {"aten", "torch.ops.aten"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, fields and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def imported_from_elsewhere(tree: ast.AST) -> set[str]:
    """Names that a file imports from the standard library and other libraries than `LIBRARIES`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names if not of_library(alias.name)}
        elif isinstance(node, ast.ImportFrom) and not of_library(node.module or ""):
            names |= {alias.asname or alias.name for alias in node.names}
    return names - {"lragent"}


def of_library(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def private_apis(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Uses of private names that a file does not define itself, except ops and names of other libraries."""
    own, elsewhere = own_names(tree), imported_from_elsewhere(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            imported = []
        for name in imported:
            if of_library(name) and any(map(is_private, name.split("."))):
                yield node.lineno, name
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            source = ast.unparse(node.value)
            if source not in OP_NAMESPACES and source.split(".")[0] not in elsewhere:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in own:
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", WITH_BENCHMARKS, ids=module_of)
def test_private_apis_are_used_in_compat_only(path: Path) -> None:
    uses = list(private_apis(ast.parse(path.read_text(encoding="utf-8"))))
    if not path.is_relative_to(ROOT / "lragent" / "compat"):
        assert uses == []
    elif path.stem in ("torch", "transformers"):  # PEFT's attributes have no underscore
        assert uses


PRIVATE_APIS = """
import torch._dynamo
from torch._ops import OpOverload
from transformers.utils import _private
torch._check(True)
program._state_dict = {}
getattr(config, "_experts_implementation", None)
self._parameters
"""
OWN_NAMES = """
import hashlib
self._steps = 0
scratch._steps
def digest(value: hashlib._Hash): ...
aten._softmax.default
torch.ops.aten._to_copy.default
getattr(mmap, "MADV_HUGEPAGE")
value.__dict__
"""


def test_private_apis_are_found() -> None:
    lines = [line for line, _ in private_apis(ast.parse(PRIVATE_APIS))]
    assert sorted(lines) == list(range(2, 9))
    assert list(private_apis(ast.parse(OWN_NAMES))) == []


def functions_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_every_function_of_compat_has_a_test(library: str) -> None:
    canaries = (ROOT / "tests" / "compat" / f"test_{library}.py").read_text(encoding="utf-8")
    for name in functions_of(ROOT / "lragent" / "compat" / f"{library}.py"):
        assert f"compat.{name}" in canaries, name


def swallowed_errors(tree: ast.AST) -> Iterator[int]:
    """Lines of handlers of all exceptions that neither raise nor use the error."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = set() if node.type is None else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        if node.type is not None and not caught & {"Exception", "BaseException"}:
            continue
        inside = [inner for statement in node.body for inner in ast.walk(statement)]
        raises = any(isinstance(inner, ast.Raise) for inner in inside)
        if not raises and not any(isinstance(inner, ast.Name) and inner.id == node.name for inner in inside):
            yield node.lineno


@pytest.mark.parametrize("path", WITH_BENCHMARKS, ids=module_of)
def test_no_error_is_swallowed(path: Path) -> None:
    assert list(swallowed_errors(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_swallowed_errors_are_found() -> None:
    handlers = ("except:\n pass", "except Exception:\n x = 0", "except (OSError, BaseException) as e:\n pass")
    for handler in handlers:
        assert list(swallowed_errors(ast.parse(f"try:\n f()\n{handler}"))) == [3]
    for handler in ("except OSError:\n pass", "except Exception as e:\n x = e", "except Exception:\n raise"):
        assert list(swallowed_errors(ast.parse(f"try:\n f()\n{handler}"))) == []


QUESTION_WORDS = {"What", "Which", "Whether", "Where", "How"}
MOST_LINES = 120  # of ARCHITECTURE.md
MOST_WORDS = 16  # of its glossary
MOST_LINES_OF_SPLIT_KV = 700  # of the six files that explain it


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_docstrings_say_what_a_thing_is(path: Path) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        assert not text or text.split()[0] not in QUESTION_WORDS, f"{module_of(path)}: {text.splitlines()[0]}"


def architecture() -> str:
    return (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_architecture_is_short() -> None:
    assert len(architecture().splitlines()) <= MOST_LINES
    words = re.findall(r"^\| (?!word|-)[^|]+ \|", architecture().partition("## Glossary")[2], re.M)
    assert 10 <= len(words) <= MOST_WORDS


def test_architecture_names_files_that_exist() -> None:
    named = set(re.findall(r"(?:\b[a-z][\w.]*/)+(?:\w+\.(?:py|md))?", architecture()))
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "lragent" / name).exists(), name


def test_six_files_explain_split_kv() -> None:
    listed = architecture().partition("Six files explain")[2].partition("\n\n")[0]
    files = re.findall(r"`([\w/]+\.py)`", listed)
    assert len(files) == 6 and "lragent/passes/split_kv.py" in files
    assert sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files) < MOST_LINES_OF_SPLIT_KV


def test_architecture_lists_every_pass_and_every_attention_implementation() -> None:
    for entry in PASSES:
        assert re.search(rf"^ {entry.name} ", architecture(), re.M), entry.name
    for name in IMPLEMENTATIONS:
        assert re.search(rf"^\| `{name}`", architecture(), re.M), name
