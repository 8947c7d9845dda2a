import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lragent
from lragent.errors import TaskFileError
from lragent_cli.verify import PROMPTS, read_prompts
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


def test_16_bits_may_err_as_peft_does_in_them(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    artifact = tmp_path / "half.lragent"
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, artifact, dtype="bfloat16", compiled=False)
    code, found = verify(artifact, tiny_llama)
    comparisons = found["comparisons"]
    assert isinstance(comparisons, list)
    assert code == 0 and found["equal"] is True
    assert found["tolerance"] == 2 * max(row["own"] for row in comparisons) > 1e-3
    code, found = verify(artifact, tiny_llama, "--tolerance", 1e-6)
    assert code == 1 and found["equal"] is False and found["tolerance"] == 1e-6


def test_all_agents_must_be_named(eager_artifact: Path, tiny_llama: WrittenModel) -> None:
    fewer = {name: path for name, path in tiny_llama.adapters.items() if name != "action"}
    code, found = verify(eager_artifact, WrittenModel(tiny_llama.model_dir, fewer))
    assert code == 1 and "differ in action" in str(found["error"])


def test_changed_weights_are_found_before_anything_runs(
    eager_artifact: Path, tiny_llama: WrittenModel, tmp_path: Path
) -> None:
    damaged = tmp_path / "m.lragent"
    shutil.copytree(eager_artifact, damaged)
    file = damaged / "weights" / "base.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, found = verify(damaged, tiny_llama)
    assert code == 1 and "sha256" in str(found["error"])


def test_prompts_come_from_a_file_or_from_us(tmp_path: Path) -> None:
    assert read_prompts(None) == list(PROMPTS)
    with pytest.raises(TaskFileError, match="can't be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(TaskFileError, match="has no prompt"):
        read_prompts(tmp_path / "empty.txt")
