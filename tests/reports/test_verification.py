"""verify: an artifact equals PEFT within a tolerance, and what differs is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lragent
from lragent.errors import AdapterError, ArtifactError, RequestError
from lragent.reports.verification import FLOAT32_TOLERANCE, ID_PROMPTS, Comparison, Verification
from lragent.runtime import Engine
from tests.models import WrittenModel


def verify(artifact: Path, written: WrittenModel, **options: Any) -> Verification:
    def engine_for(sharing: str) -> Engine:
        return lragent.load(artifact, sharing=sharing, backend="eager", kv_memory="4MiB")

    fixed: dict[str, Any] = {"new_tokens": 6, "engine_for": engine_for}
    return lragent.verify(artifact, written.model_dir, written.adapters, **fixed | options)


def test_an_artifact_equals_peft(eager_artifact: Path, tiny_llama: WrittenModel) -> None:
    stages: list[str] = []
    found = verify(eager_artifact, tiny_llama, prompts=["one", "two"], schemes=["full_shared"], progress=stages.append)
    assert found.equal and found.tolerance == FLOAT32_TOLERANCE
    assert {(row.sharing, row.agent, row.tokens, row.own) for row in found.comparisons} == {
        ("full_shared", agent, 12, 0.0) for agent in ("base", "plan", "action", "reflect")
    }
    assert stages == ["hashing weights", "loading the model with PEFT", "comparing full_shared"]


def test_16_bits_may_err_as_peft_does_in_them(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    artifact = tmp_path / "half.lragent"
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, artifact, dtype="bfloat16", compiled=False)
    found = verify(artifact, tiny_llama)
    assert found.equal
    assert found.tolerance == 2 * max(row.own for row in found.comparisons) > FLOAT32_TOLERANCE
    assert not verify(artifact, tiny_llama, tolerance=1e-6).equal


def test_all_agents_must_be_named(eager_artifact: Path, tiny_llama: WrittenModel) -> None:
    fewer = {name: path for name, path in tiny_llama.adapters.items() if name != "action"}
    with pytest.raises(AdapterError, match="differ in action"):
        verify(eager_artifact, WrittenModel(tiny_llama.model_dir, fewer))


@pytest.mark.parametrize("nothing", ["prompts", "schemes"])
def test_nothing_to_compare_is_refused(nothing: str, eager_artifact: Path, tiny_llama: WrittenModel) -> None:
    with pytest.raises(RequestError, match="no prompt or no sharing scheme"):
        verify(eager_artifact, tiny_llama, **{nothing: ()})


@pytest.mark.parametrize("name", ["weights/base.safetensors", "tokenizer/tokenizer.json"])
def test_a_changed_file_is_found_before_anything_runs(
    name: str, eager_artifact: Path, tiny_llama: WrittenModel, tmp_path: Path
) -> None:
    damaged = tmp_path / "m.lragent"
    shutil.copytree(eager_artifact, damaged)
    file = damaged / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256"):
        verify(damaged, tiny_llama)


def test_a_token_that_peft_likes_less_counts_like_a_difference() -> None:
    row = Comparison("non_shared", "plan", tokens=3, same=2, behind=0.5, difference=0.25, own=0.0)
    assert Verification((row,), 0.5).worst == 0.5
    assert Verification((row,), 0.5).equal and not Verification((row,), 0.4).equal


@pytest.fixture(scope="module")
def without_tokenizer(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a model of 16 positions whose folder has no tokenizer."""
    directory = tmp_path_factory.mktemp("bare")
    (directory / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama.model_dir / name, directory / "model")
    config = directory / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 16}))
    lragent.convert(directory / "model", tiny_llama.adapters, directory / "m.lragent", compiled=False)
    return directory / "m.lragent"


def test_an_artifact_without_tokenizer_is_compared_on_token_ids(
    without_tokenizer: Path, tiny_llama: WrittenModel
) -> None:
    found = verify(without_tokenizer, tiny_llama, schemes=["non_shared"])
    assert found.equal and not found.on_text
    assert {row.tokens for row in found.comparisons} == {len(ID_PROMPTS) * 6}
    given = verify(without_tokenizer, tiny_llama, schemes=["non_shared"], prompts=[[5, 6, 7]])
    assert given.equal and {row.tokens for row in given.comparisons} == {6}


def test_text_without_a_tokenizer_is_refused_before_anything_is_read(
    without_tokenizer: Path, tiny_llama: WrittenModel
) -> None:
    stages: list[str] = []
    with pytest.raises(RequestError, match=r"has no tokenizer, and a prompt is text\nLeave the prompts out"):
        verify(without_tokenizer, tiny_llama, prompts=["one"], progress=stages.append)
    assert stages == []


def test_under_neutral_shared_only_base_is_compared(eager_artifact: Path, tiny_llama: WrittenModel) -> None:
    found = verify(eager_artifact, tiny_llama, prompts=["one"], schemes=["neutral_shared"])
    assert found.equal and [row.agent for row in found.comparisons] == ["base"]
