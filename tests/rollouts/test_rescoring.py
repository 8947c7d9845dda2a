"""A run under a shared scheme of which nothing is known rescores a sample of its trajectories."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lragent
from lragent.artifact.directory import open_artifact
from lragent.errors import ModelError
from lragent.rollouts import rescoring
from lragent.rollouts.rescoring import FIRST, Rescored
from lragent.rollouts.turn_sequences import read_turn_sequences
from lragent.runtime import Engine, Trajectory
from lragent.runtime.evidence import Evidence
from lragent.training.drift import measure_drift
from lragent.training.open_model import shared_model_of_artifact

TASKS = 7


async def flow(task: dict[str, Any], t: Trajectory) -> dict[str, Any]:
    t.append(f"task {task['id']}")
    if task["id"] == 0:
        raise KeyError("no such town")
    for agent in ("plan", "action", "plan"):
        await t.agenerate(agent, max_new_tokens=5, ignore_eos=True)
        t.append("seen")
    return {}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(TASKS)))
    return file


@pytest.fixture
def run(eager_artifact: Path, tasks: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the tasks under a scheme; returns the summary and the newest start in the run file."""

    def run_it(sharing: str = "full_shared", evidence: Evidence | None = None, **options: Any) -> Any:
        engine = lragent.load(eager_artifact, sharing, backend="eager", kv_memory="4MiB")
        if evidence is not None:
            engine = _with(engine, evidence)
        out = tmp_path / f"{sharing}.jsonl"
        summary = lragent.rollout(engine, flow, tasks, out, existing="overwrite", **options)
        assert len(out.read_text().splitlines()) == TASKS
        return summary, json.loads(Path(f"{out}.run.json").read_text())["runs"][-1]["starts"][-1]

    return run_it


def _with(engine: Engine, evidence: Evidence) -> Engine:
    engine._evidence = evidence
    return engine


def test_the_first_finished_trajectories_are_rescored(
    run: Callable[..., Any], eager_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary, start = run(concurrency=1)
    found = summary.rescored
    assert (found.trajectories, found.error) == (FIRST, "") and found.seconds > 0
    artifact = open_artifact(eager_artifact)
    digests = {agent.name: agent.digest for agent in artifact.manifest.agents}
    finished = read_turn_sequences(tmp_path / "full_shared.jsonl", digests, 128, 256).sequences[:FIRST]
    (expected,) = measure_drift(shared_model_of_artifact(artifact), finished, ["full_shared"]).schemes
    assert found.drift.total.tokens == expected.total.tokens == FIRST * 15
    assert found.drift.total.kl == pytest.approx(expected.total.kl, rel=1e-3)
    assert start["drift"] == json.loads(json.dumps(found.to_dict())) == summary.to_dict()["rescored"]
    assert start["drift"]["kl"] == found.drift.total.mean_kl and start["drift"]["trajectories"] == FIRST
    assert found.too_far  # strong random adapters
    warnings = [record.getMessage() for record in caplog.records if "sharing full_shared" in record.getMessage()]
    assert len(warnings) == 1 and "above the limit of 0.02" in warnings[0] and "rescored trajectories" in warnings[0]


def test_others_are_drawn(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescoring, "ONE_OF", 1)
    monkeypatch.setattr(rescoring, "MOST_WAITING", TASKS)
    assert run()[0].rescored.trajectories == TASKS - 1  # the failed one is left out


@pytest.mark.parametrize(
    ("sharing", "options"),
    [
        ("full_shared", {"rescore": False}),
        ("non_shared", {}),
        ("full_shared", {"evidence": Evidence("tuned")}),
        ("full_shared", {"evidence": Evidence("none")}),  # a model that can't be opened again
    ],
    ids=["off", "exact", "tuned", "no model"],
)
def test_nothing_is_rescored_without_need(run: Callable[..., Any], sharing: str, options: dict[str, Any]) -> None:
    summary, start = run(sharing, **options)
    assert summary.rescored is None and "drift" not in start and summary.to_dict()["rescored"] is None


def test_the_display_hears_of_each_trajectory(run: Callable[..., Any], eager_artifact: Path, tasks: Path) -> None:
    from lragent.rollouts.run import run_rollout

    engine = lragent.load(eager_artifact, "base_lr_shared", backend="eager", kv_memory="4MiB")
    seen: list[Rescored] = []
    run_rollout(engine, flow, tasks, tasks.with_name("r.jsonl"), on_drift=seen.append)
    assert [found.trajectories for found in seen] == list(range(1, FIRST + 1))


def _no_model() -> Any:
    raise ModelError("weights are gone", "Convert again.")


def test_an_error_of_rescoring_is_a_sentence_and_no_result_is_lost(run: Callable[..., Any]) -> None:
    summary, start = run(evidence=Evidence("none", open_model=_no_model))
    assert (summary.done, summary.failed) == (TASKS, 1)
    assert summary.rescored.error == start["drift"]["error"] == "ModelError: weights are gone"
    assert summary.rescored.in_words() == "rescoring failed: ModelError: weights are gone"
    assert summary.rescored.drift is None and not summary.rescored.too_far


def test_a_run_that_ends_early_does_not_wait(eager_artifact: Path, tasks: Path) -> None:
    engine = lragent.load(eager_artifact, "full_shared", backend="eager", kv_memory="4MiB")
    heard: list[Rescored] = []

    def stop(outcome: object) -> None:
        raise KeyboardInterrupt

    from lragent.rollouts.run import run_rollout

    with pytest.raises(KeyboardInterrupt):
        run_rollout(engine, flow, tasks, tasks.with_name("r.jsonl"), on_result=stop, on_drift=heard.append)
    assert len(heard) <= 1


def test_words_for_a_small_drift(run: Callable[..., Any]) -> None:
    found = replace(run()[0].rescored, max_kl=1e6)
    assert "above the limit" not in found.in_words() and "top-1" in found.in_words()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own elsewhere")
def test_the_run_goes_first(run: Callable[..., Any]) -> None:
    found: list[int] = []

    def open_model() -> Any:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        raise ModelError("seen")

    run(evidence=Evidence("none", open_model=open_model))
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [max(before, rescoring.NICE)]
