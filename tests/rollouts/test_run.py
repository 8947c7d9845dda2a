"""run_rollout: every task becomes one line, and a resumed run computes only what is missing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import lragent
from lragent.errors import RequestError, TaskFileError
from lragent.rollouts.run import plan_rollout
from lragent.runtime import Engine, RolloutResult, Trajectory


async def flow(task: dict[str, Any], t: Trajectory) -> dict[str, Any]:
    t.append(task["text"])
    if task.get("raise"):
        raise KeyError("no such town")
    plan = await t.agenerate("plan", max_new_tokens=4, ignore_eos=True)
    return {"said": plan.token_ids} if not task.get("set") else {"never": {1, 2}}


@pytest.fixture
def engine(eager_artifact: Path) -> Engine:
    return lragent.load(eager_artifact, backend="eager", kv_memory="4MiB")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    lines = [{"id": f"t{i}", "text": f"task {i}"} for i in range(4)]
    lines[1]["raise"] = lines[2]["set"] = "yes"
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_every_task_becomes_a_line(engine: Engine, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    seen: list[RolloutResult] = []
    summary = lragent.rollout(engine, flow, tasks, out, concurrency=3, on_result=seen.append)
    lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert set(lines) == {"t0", "t1", "t2", "t3"} == {outcome.task_id for outcome in seen}
    assert {name for name, line in lines.items() if line["error"]} == {"t1", "t2"}
    assert {outcome.task_id for outcome in seen if outcome.error} == {"t1", "t2"}
    assert (summary.tasks, summary.kept, summary.done, summary.failed) == (4, 0, 4, 2)
    assert summary.generated_tokens == 3 * 4
    assert summary.computed["prefill"] == sum(line["usage"]["prefill"] for line in lines.values()) > 0


def test_a_resumed_run_reports_its_own_work_only(engine: Engine, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    lragent.rollout(engine, flow, tasks, out)
    whole = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    out.write_text("".join(json.dumps(whole[name]) + "\n" for name in ("t1", "t3")) + '{"id": "t0", "res')
    summary = lragent.rollout(engine, flow, tasks, out, existing="resume")
    resumed = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line["token_ids"] for name, line in resumed.items()} == {
        name: line["token_ids"] for name, line in whole.items()
    }
    assert (summary.kept, summary.done, summary.failed, summary.generated_tokens) == (2, 2, 1, 8)
    assert summary.computed["prefill"] == sum(resumed[name]["usage"]["prefill"] for name in ("t0", "t2"))
    nothing = lragent.rollout(engine, flow, tasks, out, existing="resume")
    assert (nothing.kept, nothing.done, nothing.tokens_per_second, nothing.computed) == (4, 0, 0.0, {})


@pytest.mark.usefixtures("forget_workflows")
def test_a_workflow_may_be_named_by_its_file(engine: Engine, tasks: Path, tmp_path: Path) -> None:
    file = tmp_path / "named_flow.py"
    file.write_text("async def go(task, t):\n    t.append(task['text'])\n    return {}\n")
    summary = lragent.rollout(engine, f"{file}:go", tasks, tmp_path / "results.jsonl")
    assert (summary.done, summary.failed) == (4, 0)


def test_files_are_checked_before_anything_runs(engine: Engine, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    whole = tasks.read_text()
    with pytest.raises(RequestError, match="are both in"):
        lragent.rollout(engine, flow, tasks, tasks, existing="overwrite")
    assert tasks.read_text() == whole
    out.write_text(json.dumps({"id": "t1"}) + "\n")
    with pytest.raises(TaskFileError, match="exists"):
        lragent.rollout(engine, flow, tasks, out)
    assert (plan_rollout(tasks, out, "resume").left, plan_rollout(tasks, out, "overwrite").left) == (3, 4)
    tasks.write_text(whole + "{\n")
    with pytest.raises(TaskFileError, match="line 5: not JSON"):
        lragent.rollout(engine, flow, tasks, out, existing="overwrite")
    assert out.read_text() == '{"id": "t1"}\n'


def test_refused_arguments_leave_the_results_as_they_are(engine: Engine, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text('{"id": "t0"}\n')
    with pytest.raises(RequestError, match="existing is 'append'"):
        lragent.rollout(engine, flow, tasks, out, existing="append")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="concurrency is 0"):
        lragent.rollout(engine, flow, tasks, out, existing="overwrite", concurrency=0)

    async def in_a_loop() -> None:
        lragent.rollout(engine, flow, tasks, out, existing="overwrite")

    with pytest.raises(RequestError, match="where an event loop is running"):
        asyncio.run(in_a_loop())
    assert out.read_text() == '{"id": "t0"}\n'
