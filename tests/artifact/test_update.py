"""update: other adapters in an artifact, its compiled programs untouched; what does not fit leaves it as it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

import lragent
from lragent.artifact import update as update_artifact
from lragent.artifact.directory import open_artifact
from lragent.compile.compile import target_name
from lragent.errors import AdapterError, ArtifactError, RequestError
from lragent.runtime.engine import Engine
from tests.models import WrittenModel, write_model
from tests.models.variants import write_variants

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    """Adapters: two of rank 4, a smaller one on fewer modules, a larger one, a DoRA."""
    configs: dict[str, dict[str, Any]] = {
        "plan": {},
        "action": {},
        "other": {"lora_alpha": 3},
        "small": {"r": 2, "target_modules": ["v_proj", "up_proj"]},
        "large": {"r": 6},
        "dora": {"use_dora": True, "target_modules": ["v_proj"]},
    }
    return write_variants(tmp_path_factory.mktemp("update"), "llama", configs)


@pytest.fixture(scope="module")
def compiled(written: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of plan and action with a spare slot, compiled for split layout; read only."""
    out = tmp_path_factory.mktemp("compiled") / "m.lragent"
    lragent.convert(written.model_dir, _named(written, "plan", "action"), out, spare=1)
    return out


@pytest.fixture
def artifact(compiled: Path, tmp_path: Path) -> Path:
    """A copy that a test may update."""
    return Path(shutil.copytree(compiled, tmp_path / "copy.lragent"))


def _named(written: WrittenModel, *names: str, **renamed: str) -> dict[str, Path]:
    return {**{n: written.adapters[n] for n in names}, **{n: written.adapters[a] for n, a in renamed.items()}}


def _turns(engine: Engine, agents: tuple[str, ...]) -> list[float]:
    with engine.trajectory(PROMPT) as t:
        return [p for agent in agents for p in t.generate(agent, max_new_tokens=4, ignore_eos=True).logprobs]


def _expected(written: WrittenModel, adapters: Mapping[str, Path], sharing: str, folder: Path) -> list[float]:
    """What an artifact made anew computes."""
    out = folder / "anew.lragent"
    lragent.convert(written.model_dir, adapters, out, compiled=False, overwrite=True)
    return _turns(lragent.load(out, sharing=sharing, backend="eager", kv_memory="1MiB"), (*adapters, "base"))


SETS = {
    "replaced": {"plan": "other", "action": "action"},
    "added": {"plan": "plan", "action": "action", "new": "small"},
    "replaced, added and removed": {"new": "other", "newer": "plan", "action": "small"},
}


@pytest.mark.parametrize("name", SETS)
def test_an_updated_artifact_runs_its_compiled_program(
    name: str, written: WrittenModel, artifact: Path, tmp_path: Path
) -> None:
    adapters = _named(written, **SETS[name])
    packages = {path: path.stat().st_mtime_ns for path in artifact.glob("compiled/*/*.pt2")}
    report = lragent.update(artifact, written.model_dir, adapters)
    assert set(report.agents) == set(adapters)
    assert {path: path.stat().st_mtime_ns for path in artifact.glob("compiled/*/*.pt2")} == packages
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        engine = lragent.load(artifact, kv_memory="1MiB")
    assert set(engine.agents) == {"base", *adapters}
    expected = _expected(written, adapters, "base_lr_shared", tmp_path)
    assert _turns(engine, (*adapters, "base")) == pytest.approx(expected, abs=1e-4)
    anew = lragent.load(tmp_path / "anew.lragent", sharing="non_shared", backend="eager", kv_memory="1MiB")
    exact = lragent.load(artifact, sharing="non_shared", backend="eager", kv_memory="1MiB")
    agents = (*adapters, "base")
    assert _turns(exact, agents) == pytest.approx(_turns(anew, agents), abs=1e-4)
    assert len(list((artifact / "weights").iterdir())) == 2  # the old adapters' file is gone


def test_spare_slots_hold_no_agent_and_no_cache(compiled: Path, written: WrittenModel, tmp_path: Path) -> None:
    engine = lragent.load(compiled, kv_memory="1MiB", backend="eager")
    assert engine.agents == ("base", "plan", "action")
    with engine.trajectory(PROMPT) as t, pytest.raises(RequestError, match="unknown agent '~1'"):
        t.generate("~1", max_new_tokens=1)
    lragent.convert(written.model_dir, _named(written, "plan", "action"), tmp_path / "x.lragent", compiled=False)
    plain = lragent.load(tmp_path / "x.lragent", kv_memory="1MiB", backend="eager")
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
        lragent.update(artifact, written.model_dir, _named(written, **adapters))
    assert {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()} == before


def test_another_base_is_refused(written: WrittenModel, artifact: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = Path(shutil.copytree(written.model_dir, tmp_path / "model"))
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"was made from another base model: .*norm\.weight differs"):
        lragent.update(artifact, model_dir, _named(written, "plan"))


def test_an_update_that_is_cut_off_leaves_the_old_artifact(
    written: WrittenModel, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    def turns() -> list[float]:
        return _turns(lragent.load(artifact, backend="eager", kv_memory="1MiB"), ("plan", "action"))

    before = turns()
    with monkeypatch.context() as patch:
        patch.setattr(update_artifact, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            lragent.update(artifact, written.model_dir, _named(written, "action", plan="other"))
    open_artifact(artifact).weights(hashed=True)
    assert turns() == before
    (artifact / ".update-killed").mkdir()  # what a kill leaves that no handler could clean up
    lragent.update(artifact, written.model_dir, _named(written, "action", plan="other"))
    assert turns() != before
    assert not list(artifact.glob(".update-*"))
    held = {entry.path for entry in open_artifact(artifact).manifest.weights}
    assert {f"weights/{file.name}" for file in (artifact / "weights").iterdir()} == held


def test_converting_over_an_artifact_keeps_packages_of_equal_programs(
    written: WrittenModel, artifact: Path, tmp_path: Path
) -> None:
    """Three agents of rank 4, as before: nothing is compiled. With a larger rank, the program is another."""
    adapters = _named(written, "plan", "action", third="other")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        report = lragent.convert(written.model_dir, adapters, artifact, overwrite=True, compiled=False)
        assert report.compiled == ()
        engine = lragent.load(artifact, kv_memory="1MiB")
    assert _turns(engine, (*adapters, "base")) == pytest.approx(
        _expected(written, adapters, "base_lr_shared", tmp_path), abs=1e-4
    )
    lragent.convert(
        written.model_dir, _named(written, "plan", "action", third="large"), artifact, overwrite=True, compiled=False
    )
    assert target_name() not in open_artifact(artifact).manifest.compiled


def test_shared_a_stays_shared(tmp_path: Path) -> None:
    ranks = {"plan": 4, "action": 4, "reflect": 4}
    shared = write_model(tmp_path / "shared", "llama", shared_a=True, ranks=ranks)
    lragent.convert(shared.model_dir, shared.adapters, tmp_path / "m.lragent", compiled=False)
    without_first = {name: shared.adapters[name] for name in ("action", "reflect")}
    lragent.update(tmp_path / "m.lragent", shared.model_dir, without_first)
    engine = lragent.load(tmp_path / "m.lragent", backend="eager", kv_memory="1MiB")
    assert _turns(engine, ("action", "reflect")) == pytest.approx(
        _expected(shared, without_first, "base_lr_shared", tmp_path)[:8], abs=1e-4
    )
    different = write_model(tmp_path / "different", "llama", ranks=ranks)
    with pytest.raises(
        AdapterError, match=r"adapters plan and action differ in their A on .*, which their slots share"
    ):
        lragent.update(
            tmp_path / "m.lragent", shared.model_dir, {**shared.adapters, "plan": different.adapters["action"]}
        )
