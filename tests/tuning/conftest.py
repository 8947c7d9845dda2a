"""Trajectories that three agents of a tiny model rolled out under `non_shared`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import lragent
from tests.models import WrittenModel, write_model

TASKS = 10
WORKFLOW = """
async def run(task, t):
    t.append(task["question"])
    for agent in ("plan", "action", "reflect"):
        await t.agenerate(agent, max_new_tokens=6, temperature=1.0, ignore_eos=True)
        t.append("Look at it: ", parse_special=False)
    return {"reward": task["number"] % 2}
"""


@dataclass(frozen=True)
class RolledOut:
    """A model with adapters, and the result file of its agents."""

    model_dir: Path
    adapters: dict[str, Path]
    workflow: Path
    tasks: Path
    results: Path


@pytest.fixture(scope="session")
def rolled_out(tmp_path_factory: pytest.TempPathFactory) -> RolledOut:
    """Adapters on all linear layers, K included, in float32; read only."""
    folder = tmp_path_factory.mktemp("rolled-out")
    return roll_out(write_model(folder, "llama", b_std=0.1), folder)


@pytest.fixture(scope="session")
def rolled_out_qv(tmp_path_factory: pytest.TempPathFactory) -> RolledOut:
    """Adapters on q and v with one A."""
    folder = tmp_path_factory.mktemp("rolled-out-qv")
    ranks = {"plan": 4, "action": 4, "reflect": 4}
    return roll_out(write_model(folder, "llama", "qv", shared_a=True, ranks=ranks), folder)


def roll_out(written: WrittenModel, folder: Path) -> RolledOut:
    names = (f"{folder.name.replace('-', '_')}.py", "tasks.jsonl", "results.jsonl")  # a module name for each model
    workflow, tasks, results = (folder / name for name in names)
    workflow.write_text(WORKFLOW)
    lines = ({"number": i, "question": f"Question {i}: what is {i * 37 % 11}?"} for i in range(TASKS))
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    artifact = folder / "m.lragent"
    lragent.convert(written.model_dir, written.adapters, artifact, compiled=False)
    engine = lragent.load(artifact, sharing="non_shared", backend="eager", kv_memory="4MiB")
    lragent.rollout(engine, f"{workflow}:run", tasks, results, seed=1)
    return RolledOut(written.model_dir, written.adapters, workflow, tasks, results)
