"""run_rollout: every task becomes one line, and a resumed run computes only what is missing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lragent
from lragent.errors import RequestError, TaskFileError
from lragent.rollouts.run import plan_rollout
from lragent.rollouts.run_facts import run_of_engine
from lragent.runtime import Engine, RolloutResult, Trajectory
from tests.models import WrittenModel


async def flow_by_ids(task: dict[str, Any], t: Trajectory) -> dict[str, Any]:
    t.append([5, 7, 9])
    await t.agenerate("plan", max_new_tokens=4, ignore_eos=True)
    return {}


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
    assert {name: line["trajectories"] for name, line in resumed.items()} == {
        name: line["trajectories"] for name, line in whole.items()
    }
    assert {line["run"] for line in resumed.values()} == {summary.run}
    assert (summary.kept, summary.done, summary.failed, summary.generated_tokens) == (2, 2, 1, 8)
    assert summary.computed["prefill"] == sum(resumed[name]["usage"]["prefill"] for name in ("t0", "t2"))
    assert [resumed[f"t{i}"]["task_index"] for i in range(4)] == [0, 1, 2, 3]
    nothing = lragent.rollout(engine, flow, tasks, out, existing="resume")
    assert (nothing.kept, nothing.done, nothing.tokens_per_second, nothing.computed) == (4, 0, 0.0, {})
    assert (nothing.kept_failed, nothing.all_failed) == (2, 2)


def test_a_retry_runs_failed_tasks_again_also_with_another_workflow(
    engine: Engine, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    first = lragent.rollout(engine, flow, tasks, out)

    async def mended(task: dict[str, Any], t: Trajectory) -> dict[str, Any]:
        if task["id"] == "t1":
            raise KeyError("no such street")
        return await flow({**task, "set": None}, t)

    with pytest.raises(TaskFileError, match=r"workflow function was test_run.py:flow and is test_run.py:.*mended"):
        lragent.rollout(engine, mended, tasks, out, existing="resume")
    for attempt in (2, 3):
        summary = lragent.rollout(engine, mended, tasks, out, existing="retry")
        lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
        assert len(out.read_text().splitlines()) == 4
        assert (lines["t1"]["attempt"], lines["t1"]["run"]) == (attempt, summary.run)
        assert (summary.failed, summary.older) == (1, 2)
    assert summary.run != first.run
    assert {name: line["run"] == first.run for name, line in lines.items()} == {
        "t0": True,
        "t1": False,
        "t2": False,
        "t3": True,
    }
    assert (lines["t2"]["attempt"], lines["t2"]["error"]) == (2, None)


def test_a_changed_engine_or_seed_is_refused(engine: Engine, tasks: Path, tmp_path: Path, eager_artifact: Path) -> None:
    out = tmp_path / "results.jsonl"
    lragent.rollout(engine, flow, tasks, out, concurrency=1)
    before = out.read_bytes()
    for other, seed, found in (
        (engine, 5, "seed was 0 and is 5"),
        (
            lragent.load(eager_artifact, "full_shared", backend="eager", kv_memory="4MiB"),
            0,
            "sharing was non_shared and is full_shared",
        ),
        (
            lragent.load(eager_artifact, backend="eager", kv_memory="4MiB", kv_dtype="bfloat16"),
            0,
            "kv_dtype was float32 and is bfloat16",
        ),
    ):
        for existing in ("resume", "retry"):
            with pytest.raises(TaskFileError, match=f"is of another run: {found}"):
                lragent.rollout(other, flow, tasks, out, existing=existing, seed=seed)  # type: ignore[arg-type]
    assert out.read_bytes() == before
    again = lragent.load(eager_artifact, backend="eager", kv_memory="2MiB", attention="reference", max_batch_tokens=64)
    assert lragent.rollout(again, flow, tasks, out, existing="resume", concurrency=2).kept == 4


def test_a_live_model_has_an_identity_too(tiny_llama: WrittenModel, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama.model_dir)
    model = PeftModel.from_pretrained(base, tiny_llama.adapters["plan"], adapter_name="plan")
    engine = lragent.optimize(model, backend="eager", kv_memory="4MiB")
    lragent.rollout(engine, flow_by_ids, tasks, out)
    assert lragent.rollout(engine, flow_by_ids, tasks, out, existing="resume").kept == 4
    written = json.loads(out.read_text().splitlines()[0])["trajectories"][0]["generated"]
    digests = {agent.name: agent.digest for agent in engine.program.agents}
    assert [span[:2] for span in written] == [["plan", digests["plan"]]]
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "embed_tokens" in name)[7] += 1
    with pytest.raises(TaskFileError, match=r"artifact weights was .* and is "):
        lragent.rollout(engine, flow_by_ids, tasks, out, existing="resume")


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
    lragent.rollout(engine, flow, tasks, out)
    first = out.read_text().splitlines(keepends=True)[0]
    out.write_text(first)
    with pytest.raises(TaskFileError, match="exists"):
        lragent.rollout(engine, flow, tasks, out)
    run = run_of_engine(engine, flow, seed=0)
    assert [plan_rollout(tasks, out, existing, run).left for existing in ("resume", "overwrite")] == [3, 4]  # type: ignore[arg-type]
    tasks.write_text(whole + "{\n")
    with pytest.raises(TaskFileError, match="line 5: not JSON"):
        lragent.rollout(engine, flow, tasks, out, existing="overwrite")
    assert out.read_text() == first


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
