import asyncio
import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest

from lragent.errors import TaskFileError
from lragent.rollouts.workflow_loading import open_workflow
from lragent.rollouts.workflow_parts import workflow_parts

pytestmark = pytest.mark.usefixtures("forget_workflows")

FLOW = "async def go(task, t):\n    return {}\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_modules_of_the_folder_are_parts_wherever_they_are_imported(tmp_path: Path) -> None:
    files = {
        "flow.py": "import json, tools.search as s\nfrom tools import prompts\n" + FLOW + "    import late\n",
        "late.py": "import flow\n",
        "tools/__init__.py": "",
        "tools/search.py": "from . import http\nfrom .inner.deep import x\nif x > 1:\n    import broken\n",
        "tools/prompts.py": "",
        "tools/http.py": "import torch\n",
        "tools/inner/deep.py": "x = 1\n",
        "broken.py": "def (\n",
    }
    for name, text in {**files, "unused.py": "", "tools/unused.py": "", "prompts.py": ""}.items():
        write(tmp_path / name, text)
    parts = workflow_parts(f"{tmp_path / 'flow.py'}:go")
    assert parts == {"function": "flow.py:go", **{name: sha(text) for name, text in files.items()}}


def test_the_folder_of_a_package_is_that_of_the_outermost(tmp_path: Path) -> None:
    files = {
        "outer/__init__.py": "",
        "outer/names.py": "",
        "outer/inner/__init__.py": "",
        "outer/inner/flow.py": "import beside\nfrom outer import names\n" + FLOW,
    }
    for name, text in {**files, "beside.py": ""}.items():
        write(tmp_path / name, text)
    assert set(workflow_parts(f"{tmp_path / 'outer/inner/flow.py'}:go")) == {"function", *files}


def test_a_function_has_the_parts_of_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "flow_of_function.py", FLOW)
    with open_workflow(f"{file}:go") as workflow:
        assert workflow_parts(workflow) == workflow_parts(f"{file}:go")


async def flow(task: dict[str, Any], t: Any, rounds: int = 1) -> dict[str, Any]:
    return {"rounds": rounds}


class Flow:
    async def __call__(self, task: dict[str, Any], t: Any) -> dict[str, Any]:
        return {}

    async def method(self, task: dict[str, Any], t: Any) -> dict[str, Any]:
        return {}


@functools.wraps(flow)
def wrapped(*arguments: Any) -> Any:
    return flow(*arguments)


@pytest.mark.parametrize(
    ("workflow", "name"),
    [
        (flow, "flow"),
        (wrapped, "flow"),
        (functools.partial(flow, rounds=3), "flow"),
        (Flow(), "Flow"),
        (Flow().method, "Flow.method"),
    ],
    ids=["function", "wrapped", "partial", "object", "method"],
)
def test_the_function_behind_wrappers_is_named(workflow: Any, name: str) -> None:
    parts = workflow_parts(workflow)
    assert parts["function"] == f"test_workflow_parts.py:{name}"
    assert parts["test_workflow_parts.py"] == sha(Path(__file__).read_text())


def test_a_function_without_a_file_is_told_by_its_code() -> None:
    def made(text: str) -> Any:
        space: dict[str, Any] = {}
        exec(compile(text, "<session>", "exec"), space)
        return space["go"]

    first, same, other = map(made, (FLOW, FLOW, FLOW.replace("{}", "{'a': 1}")))
    assert workflow_parts(first) == workflow_parts(same) != workflow_parts(other)
    assert asyncio.run(other({}, None)) == {"a": 1} and set(workflow_parts(other)) == {"function", "code"}


def test_a_missing_file_is_named() -> None:
    with pytest.raises(TaskFileError, match="doesn't exist"):
        workflow_parts("nowhere/flow.py:go")
