"""update: other adapters in an artifact; what does not fit leaves it as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import lragent
from lragent.artifact import update as update_artifact
from lragent.artifact.directory import open_artifact
from lragent.errors import AdapterError, ArtifactError, RequestError
from tests.artifact.update_cases import PROMPT, named, turns_made_anew, turns_of
from tests.models import WrittenModel, write_model


@pytest.fixture(scope="module")
def converted(written: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of plan and action with a spare slot; read only."""
    out = tmp_path_factory.mktemp("converted") / "m.lragent"
    lragent.convert(written.model_dir, named(written, "plan", "action"), out, spare=1, compiled=False)
    return out


def test_spare_slots_hold_no_agent_and_no_cache(converted: Path, written: WrittenModel, tmp_path: Path) -> None:
    engine = lragent.load(converted, "base_lr_shared", kv_memory="1MiB", backend="eager")
    assert engine.agents == ("base", "plan", "action")
    with engine.trajectory(PROMPT) as t, pytest.raises(RequestError, match="unknown agent '~1'"):
        t.generate("~1", max_new_tokens=1)
    lragent.convert(written.model_dir, named(written, "plan", "action"), tmp_path / "x.lragent", compiled=False)
    plain = lragent.load(tmp_path / "x.lragent", "base_lr_shared", kv_memory="1MiB", backend="eager")
    assert engine.stats().page_bytes == plain.stats().page_bytes


@pytest.mark.parametrize(
    ("adapters", "kind", "says"),
    [
        ({"plan": "large"}, AdapterError, r"adapter plan has rank 6 on .*, its slot has rank 4\nConvert again"),
        ({"plan": "dora"}, (AdapterError, ArtifactError), "no agent adapts|would change"),
        ({n: "plan" for n in "abcd"}, AdapterError, r"slots for 3 agents, not for 4\n.*--spare"),
        (
            {"plan": "plan", "action": "dora"},
            ArtifactError,
            r"program of .* would change: it needs lora_.*, which the artifact lacks\nConvert the model again",
        ),
    ],
    ids=["rank", "modules", "agents", "variant"],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    adapters: dict[str, str], kind: Any, says: str, written: WrittenModel, artifact: Path
) -> None:
    before = {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=says):
        lragent.update(artifact, written.model_dir, named(written, **adapters))
    assert {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()} == before


def test_another_base_is_refused(written: WrittenModel, artifact: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = Path(shutil.copytree(written.model_dir, tmp_path / "model"))
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"was made from another base model: .*norm\.weight differs"):
        lragent.update(artifact, model_dir, named(written, "plan"))


def test_an_update_that_is_cut_off_leaves_the_old_artifact(
    written: WrittenModel, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    def turns() -> list[float]:
        return turns_of(lragent.load(artifact, "base_lr_shared", backend="eager", kv_memory="1MiB"), ("plan", "action"))

    before = turns()
    with monkeypatch.context() as patch:
        patch.setattr(update_artifact, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            lragent.update(artifact, written.model_dir, named(written, "action", plan="other"))
    open_artifact(artifact).weights(hashed=True)
    assert turns() == before
    (artifact / ".update-killed").mkdir()  # what a kill leaves that no handler could clean up
    lragent.update(artifact, written.model_dir, named(written, "action", plan="other"))
    assert turns() != before
    assert not list(artifact.glob(".update-*"))
    held = {entry.path for entry in open_artifact(artifact).manifest.weights}
    assert {f"weights/{file.name}" for file in (artifact / "weights").iterdir()} == held


def test_shared_a_stays_shared(tmp_path: Path) -> None:
    ranks = {"plan": 4, "action": 4, "reflect": 4}
    shared = write_model(tmp_path / "shared", "llama", shared_a=True, ranks=ranks)
    lragent.convert(shared.model_dir, shared.adapters, tmp_path / "m.lragent", compiled=False)
    without_first = {name: shared.adapters[name] for name in ("action", "reflect")}
    lragent.update(tmp_path / "m.lragent", shared.model_dir, without_first)
    engine = lragent.load(tmp_path / "m.lragent", "base_lr_shared", backend="eager", kv_memory="1MiB")
    assert turns_of(engine, ("action", "reflect")) == pytest.approx(
        turns_made_anew(shared, without_first, "base_lr_shared", tmp_path)[:8], abs=1e-4
    )
    different = write_model(tmp_path / "different", "llama", ranks=ranks)
    with pytest.raises(
        AdapterError, match=r"adapters plan and action differ in their A on .*, which their slots share"
    ):
        lragent.update(
            tmp_path / "m.lragent", shared.model_dir, {**shared.adapters, "plan": different.adapters["action"]}
        )
