import asyncio
import sys
from pathlib import Path

import pytest

from lragent.errors import TaskFileError
from lragent.rollouts.workflow_loading import open_workflow

pytestmark = pytest.mark.usefixtures("forget_workflows")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_workflow_beside_its_modules(tmp_path: Path) -> None:
    write(tmp_path / "flow_tools.py", "ANSWER = 42\n")
    file = write(
        tmp_path / "flow.py", "import flow_tools\nasync def go(task, t):\n    return {'a': flow_tools.ANSWER}\n"
    )
    with open_workflow(f"{file}:go") as workflow:
        assert asyncio.run(workflow({}, None)) == {"a": 42}  # type: ignore[arg-type]


def test_its_folder_is_importable_while_it_runs_and_no_longer(tmp_path: Path) -> None:
    write(tmp_path / "late_tools.py", "ANSWER = 42\n")
    file = write(
        tmp_path / "late.py",
        "async def go(task, t):\n    import late_tools\n    return {'a': late_tools.ANSWER}\n",
    )
    before = list(sys.path)
    with open_workflow(f"{file}:go") as workflow:
        assert asyncio.run(workflow({}, None)) == {"a": 42}  # type: ignore[arg-type]
    assert sys.path == before
    with pytest.raises(TaskFileError), open_workflow(f"{file}:other"):
        pass
    assert sys.path == before


def test_changed_files_are_imported_anew_and_others_are_not(tmp_path: Path) -> None:
    text = "import count_tools\nasync def go(task, t):\n    return {'a': count_tools.ANSWER}\n"
    tools = write(tmp_path / "count_tools.py", "ANSWER = 42\n")
    file = write(tmp_path / "count.py", text)

    def answer() -> object:
        with open_workflow(f"{file}:go") as workflow:
            return asyncio.run(workflow({}, None)), workflow  # type: ignore[arg-type]

    first, again = answer(), answer()
    assert first == again == ({"a": 42}, first[1])  # type: ignore[index]
    write(tools, "ANSWER = 420\n")
    changed = answer()
    assert changed[0] == {"a": 420} and changed[1] is not first[1]  # type: ignore[index]


def test_a_workflow_inside_a_package(tmp_path: Path) -> None:
    for folder in ("outer", "outer/inner"):
        write(tmp_path / folder / "__init__.py", "")
    write(tmp_path / "outer/names.py", "NAME = 'x'\n")
    file = write(
        tmp_path / "outer/inner/flow.py",
        "from outer.names import NAME\nasync def go(task, t, rounds=3):\n    return {'n': NAME}\n",
    )
    with open_workflow(f"{file}:go") as workflow:
        assert workflow.__module__ == "outer.inner.flow"
        assert asyncio.run(workflow({}, None)) == {"n": "x"}  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["flow.py", "flow:go", "flow.py:", ":go", "flow.py:go there"])
def test_a_spec_of_another_form_is_refused(spec: str) -> None:
    with pytest.raises(TaskFileError, match=r"isn't FILE\.py:FUNC"), open_workflow(spec):
        pass


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.py"
    with pytest.raises(TaskFileError, match=r"nowhere\.py doesn't exist"), open_workflow(f"{missing}:go"):
        pass


def test_a_missing_function_lists_those_there(tmp_path: Path) -> None:
    file = write(tmp_path / "flow.py", "async def one(task, t): ...\nasync def two(task, t): ...\ndef three(): ...\n")
    found = r"has no 'four'\nAsync functions there: one, two\."
    with pytest.raises(TaskFileError, match=found), open_workflow(f"{file}:four"):
        pass


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def go(task, t): ...", "is a plain function"),
        ("go = 3", "is of type int"),
        ("async def go(task): ...", r"go\(task\) can't be called with a task and a trajectory"),
        ("async def go(task, t, more): ...", r"go\(task, t, more\) can't be called"),
    ],
    ids=["not async", "no function", "too few parameters", "too many parameters"],
)
def test_what_is_no_workflow_is_refused(tmp_path: Path, text: str, found: str) -> None:
    file = write(tmp_path / "flow.py", text)
    with pytest.raises(TaskFileError, match=found), open_workflow(f"{file}:go"):
        pass


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\nx.nothing\n", r"flow\.py line 2 raised AttributeError when imported: 'int' object has"),
        ("import no_such_module_anywhere\n", r"flow\.py line 1 raised ModuleNotFoundError"),
        ("def go(:\n", r"flow\.py raised SyntaxError when imported: .*line 1"),
    ],
    ids=["attribute", "import", "syntax"],
)
def test_an_import_that_raises_is_shown(tmp_path: Path, text: str, found: str) -> None:
    file = write(tmp_path / "flow.py", text)
    with pytest.raises(TaskFileError, match=found), open_workflow(f"{file}:go"):
        pass


def test_a_file_named_like_a_loaded_module_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "json.py", "async def go(task, t): ...\n")
    with pytest.raises(TaskFileError, match="Python has another module named 'json'"), open_workflow(f"{file}:go"):
        pass
