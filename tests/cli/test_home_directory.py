"""`~` is the home directory in every path that a command or function takes, also after "=" and ",", where no shell
expands it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lragent
from lragent.runtime import Engine
from tests.cli.conftest import call
from tests.models import WrittenModel

NAMED = "plan=~/adapters/plan,action=~/adapters/action"
PLAIN = ("--backend", "eager", "--attention", "torch")  # builds no kernels, which would go into this home directory
WORKFLOW = """
async def run(task, t):
    t.append("one")
    await t.agenerate("plan", max_new_tokens=2)
    return {}
"""


@pytest.fixture
def home(tiny_llama: WrittenModel, tmp_path: Path) -> Path:
    """A home directory with a model, adapters, an artifact, a workflow, prompts and tasks."""
    directory = tmp_path / "home"
    shutil.copytree(tiny_llama.model_dir, directory / "model")
    shutil.copytree(tiny_llama.adapters["plan"].parent, directory / "adapters")
    (directory / "flow.py").write_text(WORKFLOW)
    (directory / "tasks.jsonl").write_text("{}\n")
    (directory / "prompts.txt").write_text("one\n")
    return directory


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))


def test_commands(home: Path) -> None:
    converted = call("convert", "~/model", "--adapters", NAMED, "-o", "~/m.lragent", "--layouts", "none")
    assert converted.code == 0, converted.err
    calls = (
        ("inspect", "~/m.lragent"),
        ("inspect", "~/model", "--adapters", NAMED),
        ("convert", "~/model", "--adapters", NAMED, "--out", "~/m.lragent", "--update"),
        ("verify", "~/m.lragent", "--model", "~/model", "--adapters", NAMED, "--prompts", "~/prompts.txt",
         *PLAIN, "--new-tokens", 2, "--schemes", "non_shared"),
        ("rollout", "~/m.lragent", "--workflow", "~/flow.py:run", "--tasks", "~/tasks.jsonl", "--out", "~/r.jsonl",
         *PLAIN),
        ("roofline", "~/m.lragent"),
        ("roofline", "~/model"),
    )  # fmt: skip
    for arguments in calls:
        outcome = call(*arguments)
        assert outcome.code == 0, (arguments, outcome.err)
    assert (home / "r.jsonl").is_file()
    assert not list(home.glob("~*"))


def test_functions(home: Path) -> None:
    adapters = {"plan": "~/adapters/plan", "action": Path("~/adapters/action")}
    lragent.convert("~/model", adapters, "~/api.lragent", compiled=False)

    def engine_for(sharing: str) -> Engine:
        return lragent.load("~/api.lragent", sharing=sharing, backend="eager", attention="torch", kv_memory="4MiB")

    assert lragent.inspect("~/api.lragent").agents == lragent.inspect(Path("~/model"), adapters).agents
    lragent.update("~/api.lragent", "~/model", adapters)
    options = {"prompts": ["one"], "schemes": ["non_shared"], "new_tokens": 2}
    assert lragent.verify("~/api.lragent", "~/model", adapters, engine_for=engine_for, **options).equal
    summary = lragent.rollout(engine_for("non_shared"), "~/flow.py:run", "~/tasks.jsonl", "~/api.jsonl")
    assert (summary.done, summary.failed) == (1, 0) and (home / "api.jsonl").is_file()
