import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lragent.errors import TaskFileError
from lragent_cli.verify import read_prompts
from tests.cli.conftest import EAGER, adapters_option, call
from tests.models import WrittenModel


def verify(artifact: Path, written: WrittenModel, *options: object) -> tuple[int, dict[str, object]]:
    fixed = ("--model", written.model_dir, "--adapters", adapters_option(written), "--backend", "eager")
    outcome = call("verify", artifact, *fixed, "--new-tokens", 6, "--json", *options)
    return outcome.code, outcome.json() if outcome.out else {"error": outcome.err}


def test_an_artifact_equals_peft(eager_artifact: Path, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\n\nanother one\n")
    code, found = verify(eager_artifact, tiny_llama, "--prompts", prompts)
    assert code == 0 and found["equal"] is True
    comparisons = found["comparisons"]
    assert isinstance(comparisons, list)
    assert {(row["sharing"], row["agent"]) for row in comparisons} == {
        (sharing, agent)
        for sharing in ("non_shared", "base_lr_shared")
        for agent in ("base", "plan", "action", "reflect")
    }
    assert all(row["tokens"] == 12 for row in comparisons)


def test_another_adapter_is_not_equal(eager_artifact: Path, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    changed = tmp_path / "plan"
    shutil.copytree(tiny_llama.adapters["plan"], changed)
    weights = load_file(changed / "adapter_model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, changed / "adapter_model.safetensors")
    other = WrittenModel(tiny_llama.model_dir, {**tiny_llama.adapters, "plan": changed})
    code, found = verify(eager_artifact, other, "--schemes", "base_lr_shared")
    assert code == 1 and found["equal"] is False


def test_the_tolerance_may_be_given(tiny_llama: WrittenModel, eager_artifact: Path) -> None:
    code, found = verify(eager_artifact, tiny_llama, "--tolerance", 1e-12)
    assert code == 1 and found["equal"] is False and found["tolerance"] == 1e-12


def test_agents_that_are_not_named_are_an_error(eager_artifact: Path, tiny_llama: WrittenModel) -> None:
    fewer = {name: path for name, path in tiny_llama.adapters.items() if name != "action"}
    code, found = verify(eager_artifact, WrittenModel(tiny_llama.model_dir, fewer))
    assert code == 1 and "differ in action" in str(found["error"])


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    assert read_prompts(None) is None
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "prompts.txt") == ("one", "two")
    with pytest.raises(TaskFileError, match="can't be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(TaskFileError, match="has no prompt"):
        read_prompts(tmp_path / "empty.txt")


@pytest.fixture
def rolled_out(eager_artifact: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the artifact, and results of two tasks under non_shared, one of which failed."""
    artifact, results = Path(shutil.copytree(eager_artifact, tmp_path / "m.lragent")), tmp_path / "results.jsonl"
    (tmp_path / "tasks.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    (tmp_path / "flow.py").write_text(
        "async def flow(task, t):\n"
        "    t.append('question')\n"
        "    for agent in ('plan', 'action', 'reflect'):\n"
        "        await t.agenerate(agent, max_new_tokens=6, ignore_eos=True)\n"
        "    return {} if task['id'] == 1 else task['none']\n"
    )
    fixed = ("--workflow", f"{tmp_path / 'flow.py'}:flow", "--tasks", tmp_path / "tasks.jsonl", "--out", results)
    outcome = call("rollout", artifact, *fixed, *EAGER)
    assert outcome.code == 3 and "2 tasks done under non_shared, 1 failed" in outcome.out
    return artifact, results


def test_drift_is_shown_and_kept(rolled_out: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, results = rolled_out
    page = tmp_path / "drift.html"
    shown = call("verify", artifact, "--trajectories", results, "--html", page)
    assert shown.code == 0, shown.err
    for text in (
        "drift from non_shared on 1 trajectories, 18 generated tokens",
        "base_lr_shared",
        "reflect",
        "no switch",
        "recommended: non_shared: under every other scheme",
        "note: 1 lines of failed tasks were left out",
    ):
        assert text in shown.out
    assert page.read_text().startswith("<!doctype html>")
    assert (artifact / "drift.json").is_file()


def test_a_larger_limit_lets_rollout_share(rolled_out: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, results = rolled_out
    options = ("--trajectories", results, "--schemes", "non_shared,base_lr_shared", "--max-kl", 100, "--json")
    found = call("verify", artifact, *options).json()["drift"]
    assert [scheme["scheme"] for scheme in found["schemes"]] == ["base_lr_shared"]
    assert (found["recommendation"], found["tokens"]) == ("base_lr_shared", 18)
    fixed = ("--workflow", f"{tmp_path / 'flow.py'}:flow", "--tasks", tmp_path / "tasks.jsonl", *EAGER, "--json")
    again = call("rollout", artifact, *fixed, "--out", tmp_path / "again.jsonl", "--max-kl", 100).json()
    assert (again["sharing"], again["rescored"]) == ("base_lr_shared", None)
    plain = call("rollout", artifact, *fixed, "--out", tmp_path / "plain.jsonl").json()
    assert plain["sharing"] == "non_shared"


def test_both_in_one_command(rolled_out: tuple[Path, Path], tiny_llama: WrittenModel) -> None:
    artifact, results = rolled_out
    code, found = verify(artifact, tiny_llama, "--trajectories", results, "--schemes", "non_shared,full_shared")
    assert code == 0 and found["equal"] is True
    drift = found["drift"]
    assert isinstance(drift, dict) and [one["scheme"] for one in drift["schemes"]] == ["full_shared"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ((), "give --model and --adapters, or --trajectories"),
        (("--model", "m"), "--model and --adapters go together"),
        (("--trajectories", "r.jsonl", "--adapters", "a=b"), "--model and --adapters go together"),
        (("--model", "m", "--adapters", "a=b", "--html", "x"), "--html shows the drift"),
        (("--trajectories", "r.jsonl", "--schemes", "all"), "unknown sharing scheme 'all'"),
    ],
    ids=["nothing", "no adapters", "no model", "page of nothing", "scheme"],
)
def test_options_that_make_no_sense_are_usage_errors(options: tuple[str, ...], found: str) -> None:
    outcome = call("verify", "m.lragent", *options)
    assert outcome.code == 2
    assert found in " ".join(outcome.err.replace("│", " ").split())


def test_a_page_that_can_not_be_written_is_an_error(rolled_out: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, results = rolled_out
    outcome = call("verify", artifact, "--trajectories", results, "--html", tmp_path / "no" / "x.html")
    assert outcome.code == 1 and "x.html can't be written" in outcome.err
