"""A result file is bound to its run: nothing else goes on with it, and a refusal names the difference."""

import json
from pathlib import Path
from typing import Any

import pytest

from lragent.errors import TaskFileError
from lragent.rollouts.kept_results import Kept, kept_results
from lragent.rollouts.run_facts import Run
from tests.rollouts.results import RUN, line, opened, places, run_file, run_with, written

A, B = {"id": "a", "q": 1}, {"id": "b", "q": 2}
TASKS = places(A, B)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return written(tmp_path / "results.jsonl", line(A), line(B, error="KeyError"))


def refusal(path: Path, existing: Any, run: Run = RUN, tasks: Any = TASKS) -> TaskFileError:
    with pytest.raises(TaskFileError) as raised:
        kept_results(path, existing, run, tasks)
    return raised.value


def test_resume_keeps_all_lines_and_retry_those_without_an_error(results: Path) -> None:
    kept = kept_results(results, "resume", RUN, TASKS)
    assert (kept.finished, kept.failed, kept.older, kept.removed) == ({("a", 0), ("b", 0)}, 1, 0, frozenset())
    kept = kept_results(results, "retry", RUN, TASKS)
    assert (kept.finished, kept.failed, kept.removed) == ({("a", 0)}, 0, {2})
    assert kept_results(results, "overwrite", RUN, TASKS) == Kept()


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("seed", 1, "seed was 0 and is 1"),
        ("artifact", {"agents": {"plan": "p2"}}, "artifact agents plan was p1 and is p2"),
        ("artifact", {"agents": {"plan": "p1", "act": "c1"}}, "artifact agents act was not there and is c1"),
        ("artifact", {}, "artifact agents plan was p1 and is not there"),
    ],
)
def test_another_run_is_refused_with_both_values(results: Path, part: str, value: Any, said: str) -> None:
    for existing in ("resume", "retry"):
        error = refusal(results, existing, run_with(**{part: value}))
        assert error.message == f"{results} is of another run: {said}"
        assert "--retry-failed" not in error.hint and "--overwrite" in error.hint


def test_a_changed_workflow_is_refused_by_resume_and_taken_by_retry(results: Path) -> None:
    workflow = {"function": "flow.py:go", "flow.py": "b" * 64, "tools.py": "c" * 64}
    changed = run_with(workflow=workflow)
    error = refusal(results, "resume", changed)
    assert error.message.endswith(
        "workflow flow.py was aaaaaaaaaaaa and is bbbbbbbbbbbb; workflow tools.py was not there and is cccccccccccc"
    )
    assert "--retry-failed" in error.hint
    assert refusal(results, "retry", run_with(workflow=workflow, seed=1)).message.endswith("run: seed was 0 and is 1")
    with opened(results, "retry", changed, TASKS) as file:
        assert file.kept.older == 1
        file.write(line(B, changed, attempt=2))
    assert [entry["run"] for entry in run_file(results)["runs"]] == [RUN.digest, changed.digest]
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    assert [(each["id"], each["run"]) for each in lines] == [("a", RUN.digest), ("b", changed.digest)]
    # From now on the new run is the one that counts.
    assert kept_results(results, "resume", changed, TASKS).older == 1
    assert "workflow flow.py was bbbbbbbbbbbb" in refusal(results, "resume", RUN).message


def test_every_start_of_a_run_is_recorded(results: Path) -> None:
    with opened(results, "resume", tasks=TASKS):
        pass
    (entry,) = run_file(results)["runs"]
    assert entry["starts"] == [{"concurrency": 1}, {"concurrency": 1}]
    assert entry["parts"] == RUN.parts


@pytest.mark.parametrize("existing", ["resume", "retry"])
def test_a_changed_task_is_refused_by_name_and_an_added_one_is_run(results: Path, existing: str) -> None:
    added = places({"id": "new"}, A, B)
    assert ("new", 0) not in kept_results(results, existing, RUN, added).finished  # type: ignore[arg-type]
    error = refusal(results, existing, tasks=places({**A, "q": 3}, B))
    assert error.message == f'{results} has results of tasks that have changed since: "a" (line 1)'
    assert kept_results(results, existing, RUN, places(B)).finished >= {("a", 0)}  # type: ignore[arg-type]


def test_tasks_without_an_id_are_told_apart_by_their_content(tmp_path: Path) -> None:
    first, second = {"q": 10}, {"q": 11}
    lines = [line({"id": number}, task_digest=places(task)[1].digest) for number, task in enumerate((first, second), 1)]
    results = written(tmp_path / "r.jsonl", *lines)
    assert kept_results(results, "resume", RUN, places(first, second, {"q": 12})).finished == {(1, 0), (2, 0)}
    error = refusal(results, "resume", tasks=places({"q": 20}, first, second))
    assert "1 (line 1), 2 (line 2)" in error.message and "line number" in error.hint


def test_many_changed_tasks_are_counted(tmp_path: Path) -> None:
    tasks = [{"id": i} for i in range(9)]
    results = written(tmp_path / "r.jsonl", *map(line, tasks))
    message = refusal(results, "resume", tasks=places(*({"id": i, "q": 1} for i in range(9)))).message
    assert message.endswith("0 (line 1), 1 (line 2), 2 (line 3), 3 (line 4), 4 (line 5) and 4 more")


def test_a_file_without_its_run_file_is_refused(results: Path) -> None:
    beside = results.with_name("results.jsonl.run.json")
    whole = beside.read_text()
    for text, said in (
        ("{", "is damaged: JSONDecodeError"),
        ("[]", "is damaged: TypeError"),
        ('{"format": 2, "runs": [], "attempts": []}', "names no run"),
        ('{"format": 2}', "is damaged: KeyError"),
        ('{"format": 9}', "has format 9, this lragent reads 2"),
    ):
        beside.write_text(text)
        assert said in refusal(results, "resume").message
    beside.unlink()
    assert "has no results.jsonl.run.json beside it" in refusal(results, "resume").message
    beside.write_text(whole)
    kept_results(results, "resume", RUN, TASKS)


@pytest.mark.parametrize(
    "changes", [{"run": "0" * 12}, {"format": 1}, {"sample": None}], ids=["run", "format", "entry"]
)
def test_a_line_of_an_unknown_run_is_refused(results: Path, changes: dict[str, Any]) -> None:
    strange = {key: value for key, value in {**line({"id": "c"}), **changes}.items() if value is not None}
    with results.open("a") as file:
        file.write(json.dumps(strange) + "\n")
    assert "line 3 is of a run that results.jsonl.run.json does not name" in refusal(results, "resume").message


def test_lines_that_are_no_results_are_passed_over(results: Path) -> None:
    with results.open("a") as file:
        file.write('{"id": [1]}\n{"note": "mine"}\n{"id": null}\n')
    assert kept_results(results, "resume", RUN, TASKS).finished == {("a", 0), ("b", 0)}


def test_a_failed_line_of_a_task_that_is_gone_stays(results: Path) -> None:
    kept = kept_results(results, "retry", RUN, places(A))
    assert (kept.removed, kept.failed, kept.finished) == (frozenset(), 0, {("a", 0), ("b", 0)})
