import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lragent.errors import TaskFileError
from lragent_cli.verify import read_prompts
from tests.cli.conftest import adapters_option, call
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
