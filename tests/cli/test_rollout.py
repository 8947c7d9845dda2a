import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lragent.artifact.manifest import read_manifest
from tests.cli.conftest import EAGER, Outcome, call

WORKFLOW = """
async def flow(task, t):
    t.append(task["text"])
    if task.get("raise"):
        raise KeyError("no such town")
    plan = await t.agenerate("plan", max_new_tokens=4, ignore_eos=True)
    t.append("observed")
    action = await t.agenerate("action", max_new_tokens=3, ignore_eos=True)
    if task.get("set"):
        return {"never": {1, 2}}
    return {"said": plan.text + action.text}
"""


class Workplace:
    """A folder with a workflow and tasks."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        self.artifact, self.out, self.tasks = artifact, folder / "results.jsonl", folder / "tasks.jsonl"
        self.workflow = folder / "flow.py"
        self.workflow.write_text(WORKFLOW)
        self.write_tasks({"id": f"t{i}", "text": f"task {i}"} for i in range(4))

    def write_tasks(self, tasks: Any) -> None:
        self.tasks.write_text("".join(json.dumps(task) + "\n" for task in tasks))

    def rollout(self, *options: object) -> Outcome:
        fixed = ("--workflow", f"{self.workflow}:flow", "--tasks", self.tasks, "--out", self.out, *EAGER)
        return call("rollout", self.artifact, *fixed, *options)

    def results(self) -> dict[str, dict[str, Any]]:
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert len({line["id"] for line in lines}) == len(lines)
        return {line["id"]: line for line in lines}


@pytest.fixture
def workplace(tmp_path: Path, eager_artifact: Path) -> Workplace:
    return Workplace(tmp_path, eager_artifact)


def test_every_task_becomes_a_line_with_who_wrote_what(workplace: Workplace) -> None:
    outcome = workplace.rollout("--sharing", "base_lr_shared", "--concurrency", 3, "--json")
    assert outcome.code == 0, outcome.err
    results = workplace.results()
    assert set(results) == {"t0", "t1", "t2", "t3"}
    line = results["t2"]
    assert line["error"] is None and isinstance(line["result"]["said"], str)
    prompt, observed = len("task 2"), len("observed")
    (trajectory,) = line["trajectories"]
    act, end = prompt + 4 + observed, prompt + observed + 7
    plan, action = (agent.digest for agent in read_manifest(workplace.artifact).agents if agent.name != "reflect")
    assert trajectory["generated"] == [["plan", plan, prompt, prompt + 4], ["action", action, act, end]]
    # An agent writes what it reads first: the last token of a turn is written by the next agent.
    assert trajectory["written"] == [["plan", plan, 0, prompt + 3], ["action", action, prompt + 3, end - 1]]
    assert trajectory["finish_reasons"] == ["length", "length"]
    for name in ("logprobs", "sampled_logprobs", "kept_mass"):
        filled = [value is not None for value in trajectory[name]]
        assert filled == [False] * prompt + [True] * 4 + [False] * observed + [True] * 3
    assert line["usage"]["prefill"] > 0 and line["usage"]["decode"] > 0
    summary = outcome.json()
    assert (summary["tasks"], summary["kept"], summary["done"], summary["failed"]) == (4, 0, 4, 0)
    assert summary["generated_tokens"] == 28 and summary["peak_cache_bytes"] > 0
    assert summary["computed"]["prefill"] == sum(result["usage"]["prefill"] for result in results.values())


@pytest.mark.parametrize("sharing", ["non_shared", "full_shared", "base_shared", "rebase_shared", "neutral_shared"])
def test_every_scheme_rolls_out(workplace: Workplace, sharing: str) -> None:
    outcome = workplace.rollout("--sharing", sharing)
    assert outcome.code == 0, outcome.err
    assert "4 tasks done under " + sharing in outcome.out
    assert len(workplace.results()) == 4


def test_a_shared_scheme_of_which_nothing_is_known_is_rescored(workplace: Workplace) -> None:
    outcome = workplace.rollout("--sharing", "full_shared")
    assert outcome.code == 0, outcome.err
    assert "drift from non_shared on 4 rescored trajectories" in outcome.out and "top-1" in outcome.out
    assert "above the limit of 0.02, so answers are probably lost; rescoring took" in outcome.out
    start = json.loads(Path(f"{workplace.out}.run.json").read_text())["runs"][-1]["starts"][-1]
    assert start["drift"]["trajectories"] == 4 and set(start["drift"]["by_agent"]) == {"plan", "action"}
    quiet = workplace.rollout("--sharing", "full_shared", "--no-rescore", "--overwrite")
    assert quiet.code == 0 and "drift" not in quiet.out
    assert len(workplace.results()) == 4


def test_auto_shares_nothing_of_which_nothing_is_known(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    assert workplace.rollout("--json").json()["sharing"] == "non_shared"
    (line,) = [record.getMessage() for record in caplog.records if "sharing is" in record.getMessage()]
    assert "under base_lr_shared a token would take" in line
    assert workplace.rollout("--resume", "--sharing", "non_shared").code == 0
    refused = workplace.rollout("--resume", "--sharing", "full_shared")
    assert refused.code == 1 and "sharing was non_shared and is full_shared" in refused.err


def test_what_fails_in_one_task_is_its_error_line(workplace: Workplace) -> None:
    tasks = [
        {"id": "good", "text": "a"},
        {"id": "raises", "text": "b", "raise": 1},
        {"id": "set", "text": "c", "set": 1},
    ]
    workplace.write_tasks(tasks)
    outcome = workplace.rollout()
    assert outcome.code == 3 and "3 tasks done under non_shared, 2 failed" in outcome.out
    assert "2 tasks have errors, --retry-failed runs them again" in outcome.out
    results = workplace.results()
    assert results["good"]["error"] is None
    error = results["raises"]["error"]
    assert (error["type"], error["message"], error["causes"]) == ("KeyError", "'no such town'", [])
    assert 'raise KeyError("no such town")' in error["traceback"] and "task_loop" not in error["traceback"]
    assert results["raises"]["result"] is None and len(results["raises"]["trajectories"][0]["token_ids"]) == 1
    assert results["set"]["error"]["type"] == "TypeError" and "isn't JSON" in results["set"]["error"]["message"]


def test_resume_keeps_whole_lines_and_gives_the_same_end(workplace: Workplace) -> None:
    assert workplace.rollout().code == 0
    whole = workplace.results()
    lines = workplace.out.read_text().splitlines(keepends=True)
    workplace.out.write_text("".join(lines[:2]) + lines[2][:-20])
    outcome = workplace.rollout("--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json()["kept"], outcome.json()["done"]) == (2, 2)
    resumed = workplace.results()
    assert {key: line["trajectories"] for key, line in resumed.items()} == {
        key: line["trajectories"] for key, line in whole.items()
    }
    nothing_left = workplace.rollout("--resume")
    assert nothing_left.code == 0 and "nothing to do" in nothing_left.out
    refused = workplace.rollout("--resume", "--seed", 1)
    assert refused.code == 1 and "is of another run: seed was 0 and is 1" in refused.err


def test_the_seed_of_a_run_decides_its_samples(workplace: Workplace) -> None:
    workplace.workflow.write_text(WORKFLOW.replace("max_new_tokens=4", "max_new_tokens=12, temperature=1.0"))
    drawn = []
    for options in ((), ("--overwrite",), ("--overwrite", "--seed", "1"), ("--overwrite", "--concurrency", "1")):
        assert workplace.rollout(*options).code == 0
        drawn.append({name: line["trajectories"] for name, line in workplace.results().items()})
    seeds = [{seed for (one,) in run.values() for seed in one["seeds"]} for run in drawn]
    assert seeds[0] == seeds[1] == seeds[3] and len(seeds[0]) == 8 and not seeds[0] & seeds[2]
    ids = [{name: one["token_ids"] for name, (one,) in run.items()} for run in drawn]
    assert ids[0] == ids[1] == ids[3] != ids[2]


def test_failed_tasks_are_run_again_with_a_mended_workflow(workplace: Workplace) -> None:
    workplace.write_tasks([{"id": "good", "text": "a"}, {"id": "raises", "text": "b", "raise": 1}])
    assert workplace.rollout().code == 3
    nothing = workplace.rollout("--resume")
    assert nothing.code == 3 and "nothing to do" in nothing.out and "1 tasks have errors" in nothing.out
    workplace.workflow.write_text(WORKFLOW.replace('task.get("raise")', "False"))
    refused = workplace.rollout("--resume")
    assert refused.code == 1 and "is of another run: workflow flow.py was" in refused.err
    assert "use --retry-failed" in refused.err
    mended = workplace.rollout("--retry-failed")
    assert mended.code == 0 and "1 lines are of an older workflow" in mended.out, mended.err
    results = workplace.results()
    assert (results["raises"]["error"], results["raises"]["attempt"]) == (None, 2)
    runs = json.loads(Path(f"{workplace.out}.run.json").read_text())["runs"]
    assert [run["run"] for run in runs] == [results["good"]["run"], results["raises"]["run"]]


def test_a_module_beside_the_workflow_is_a_part_of_it(workplace: Workplace) -> None:
    tools = workplace.workflow.with_name("flow_tools.py")
    tools.write_text("NUMBER = 4\n")
    workplace.workflow.write_text("import flow_tools\n" + WORKFLOW)
    assert workplace.rollout().code == 0
    tools.write_text("NUMBER = 5\n")
    refused = workplace.rollout("--resume")
    assert refused.code == 1 and "workflow flow_tools.py was" in refused.err


def test_a_changed_task_is_refused_by_name(workplace: Workplace) -> None:
    assert workplace.rollout().code == 0
    before = workplace.out.read_text()
    workplace.write_tasks([{"id": f"t{i}", "text": f"task {i + (i == 2)}"} for i in range(5)])
    refused = workplace.rollout("--resume")
    assert refused.code == 1 and '"t2" (line 3)' in refused.err
    assert workplace.out.read_text() == before
    workplace.write_tasks([{"id": f"t{i}", "text": f"task {i}"} for i in reversed(range(5))])
    assert workplace.rollout("--resume").code == 0
    assert {line["id"]: line["task_index"] for line in workplace.results().values()} == {
        **{f"t{i}": i for i in range(4)},
        "t4": 0,
    }


KILLED = """
import os, signal
async def flow(task, t):
    t.append(task["text"])
    await t.agenerate("plan", max_new_tokens=4, temperature=1.0, ignore_eos=True)
    if task["id"] in os.environ.get("KILL_AT", "").split(","):
        os.kill(os.getpid(), signal.SIGKILL)
    return {}
"""


def test_a_run_that_is_killed_is_completed_by_resume(workplace: Workplace) -> None:
    workplace.workflow.write_text(KILLED)
    workplace.write_tasks({"id": f"t{i}", "text": f"task {i}"} for i in range(9))
    command = [sys.executable, "-c", "from lragent_cli.main import app; app()", "rollout", workplace.artifact]
    fixed = ("--workflow", f"{workplace.workflow}:flow", "--tasks", workplace.tasks, "--out", workplace.out, *EAGER)
    killed = subprocess.run(
        [*map(str, (*command, *fixed, "--concurrency", 2))], env={**os.environ, "KILL_AT": "t5"}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = set(workplace.results())
    assert 3 <= len(done) < 6
    with workplace.out.open("a") as file:
        file.write('{"format": 2, "id": "t5", "ta')
    outcome = workplace.rollout("--resume", "--json")
    assert outcome.code == 0 and outcome.json()["kept"] == len(done), outcome.err
    resumed = workplace.results()
    assert set(resumed) == {f"t{i}" for i in range(9)}
    assert not Path(f"{workplace.out}.lock").exists() or workplace.rollout("--resume").code == 0
    assert workplace.rollout("--overwrite").code == 0
    for name, line in workplace.results().items():
        assert line["trajectories"] == resumed[name]["trajectories"]


def test_an_existing_output_is_an_error_unless_overwritten(workplace: Workplace) -> None:
    workplace.out.write_text('{"id": "old"}\n')
    refused = workplace.rollout()
    assert refused.code == 1
    assert refused.err == (
        f"error: {workplace.out} exists\nhint: Go on with it (--resume), or replace it (--overwrite).\n"
    )
    assert workplace.out.read_text() == '{"id": "old"}\n'
    assert workplace.rollout("--overwrite").code == 0
    assert set(workplace.results()) == {"t0", "t1", "t2", "t3"}


def test_an_unreadable_line_stops_everything_before_it_starts(workplace: Workplace) -> None:
    workplace.tasks.write_text('{"id": "a", "text": "x"}\n{"id": "b"\n')
    outcome = workplace.rollout()
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {workplace.tasks} line 2: not JSON")
    assert not workplace.out.exists()


def test_a_broken_artifact_leaves_results_alone(workplace: Workplace, tmp_path: Path) -> None:
    workplace.out.write_text('{"id": "old"}\n')
    workplace.artifact = tmp_path / "no.lragent"
    assert workplace.rollout("--overwrite").code == 1
    assert workplace.out.read_text() == '{"id": "old"}\n'


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
        (("--resume", "--retry-failed"), "--resume and --retry-failed exclude each other"),
        (("--out", "nowhere/results.jsonl"), "there is no directory nowhere"),
    ],
    ids=["both", "two ways", "directory"],
)
def test_options_that_make_no_sense_are_usage_errors(
    workplace: Workplace, options: tuple[str, ...], found: str
) -> None:
    outcome = workplace.rollout(*options)
    assert outcome.code == 2
    assert found in " ".join(outcome.err.replace("│", " ").split())


def test_results_may_not_replace_tasks(workplace: Workplace) -> None:
    outcome = workplace.rollout("--out", workplace.tasks, "--overwrite")
    assert outcome.code == 2
    assert workplace.tasks.read_text().startswith('{"id": "t0"')


def test_a_result_that_strict_json_can_not_hold_is_an_error_line(workplace: Workplace) -> None:
    workplace.workflow.write_text(
        "async def flow(task, t):\n"
        "    deep = []\n"
        "    for _ in range(100_000):\n"
        "        deep = [deep]\n"
        "    return {'t0': {'a': float('nan')}, 't1': deep}.get(task['id'], {})\n"
    )
    outcome = workplace.rollout("--json")
    assert (outcome.code, outcome.json()["failed"]) == (3, 2)
    results = workplace.results()
    for name in ("t0", "t1"):
        assert results[name]["result"] is None
        assert "isn't JSON" in results[name]["error"]["message"]
    assert results["t2"]["error"] is None


def test_a_workflow_file_that_exits_is_named(workplace: Workplace) -> None:
    workplace.workflow.write_text("import sys\nsys.exit('usage: flow.py')\n")
    outcome = workplace.rollout()
    assert outcome.code == 1
    assert "flow.py line 2 raised SystemExit when imported" in outcome.err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--device", "cuda:99"), "does not exist"),
        (("--device", "warp"), "unknown device 'warp'"),
        (("--device", "meta"), "don't run on device 'meta'"),
        (("--threads", "100000"), "threads is 100000"),
    ],
    ids=["no GPU", "unknown", "other", "threads"],
)
def test_what_this_machine_does_not_have_is_named(workplace: Workplace, options: tuple[str, ...], found: str) -> None:
    outcome = workplace.rollout(*options)
    assert outcome.code == 1
    assert found in outcome.err
    assert not workplace.out.exists()


def test_an_interrupted_run_says_how_to_go_on(workplace: Workplace) -> None:
    text = WORKFLOW.replace("    plan =", "    if task['id'] == 't2':\n        raise KeyboardInterrupt\n    plan =")
    workplace.workflow.write_text(text)
    outcome = workplace.rollout("--concurrency", "1")
    assert outcome.code == 130
    assert "go on with --resume" in outcome.err
    assert set(workplace.results()) == {"t0", "t1"}
