"""artifact: what is written is whole or not there; what is damaged or foreign is refused with both values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

import lragent
from lragent.artifact.directory import new_directory, open_artifact
from lragent.artifact.manifest import FORMAT, SEAL, read_manifest, seal_of
from lragent.compile.compile import target_name
from lragent.compile.fingerprint import fingerprint
from lragent.errors import ArtifactError, CompilerMissing, ModelError, RequestError
from lragent.files.locks import directory_lock
from lragent.graph.graph_file import read_graph
from lragent.kernels import cpp_library
from lragent.program.dtypes import LAYOUTS
from tests.models import WrittenModel


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy.lragent"))


def _edit(artifact: Path, **changes: Any) -> None:
    """Makes it an artifact that was written, and sealed, with other values."""
    _write_sealed(artifact, {**_entries(artifact), **changes})


def _entries(artifact: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())
    del held[SEAL]
    return held


def _write_sealed(artifact: Path, entries: dict[str, Any]) -> None:
    (artifact / "manifest.json").write_text(json.dumps({**entries, SEAL: seal_of(entries)}))


def test_contents(tiny_artifact: Path) -> None:
    manifest = open_artifact(tiny_artifact).manifest
    assert [a.name for a in manifest.agents] == ["plan", "action", "reflect"]
    assert set(manifest.layouts) == {"split", "dense"}
    assert list(manifest.compiled[target_name()]) == ["split-torch-float32"] or list(
        manifest.compiled[target_name()]
    ) == ["split-cpp-float32"]
    files = {p.suffix for p in tiny_artifact.rglob("*") if p.is_file()}
    assert not files & {".pkl", ".bin", ".pth"}


def test_every_weight_is_stored_once_and_as_it_was(tiny_artifact: Path, tiny_llama: WrittenModel) -> None:
    from safetensors.torch import load_file

    weights = open_artifact(tiny_artifact).weights(hashed=True)
    base = load_file(tiny_llama.model_dir / "model.safetensors")
    held = {name.replace(".base_layer", "").removeprefix("model."): t for name, t in weights.items()}
    for name, tensor in base.items():
        assert torch.equal(held[name], tensor), name
    stored = sum(f.stat().st_size for f in (tiny_artifact / "weights").iterdir())
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in weights.values()}
    assert stored < sum(unique.values()) + 200 * len(weights) + 4096


def test_the_model_is_exported_once_for_both_layouts(
    tiny_llama: WrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs that are read are those that were rewritten, to the code and to the constants."""
    exported: list[Any] = []
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *given, **more: exported.append(given) or real(*given, **more))
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, tmp_path / "m.lragent", compiled=False)
    assert len(exported) == 1
    artifact = open_artifact(tmp_path / "m.lragent")
    assert set(artifact.manifest.layouts) == set(LAYOUTS)
    for entry in artifact.manifest.layouts.values():
        graph = read_graph(artifact.file(entry.program), artifact.weights())
        assert fingerprint(graph, entry.schema) == entry.fingerprint


def test_a_tokenizer_file_is_kept_as_it_is(tiny_artifact: Path, tiny_llama: WrittenModel) -> None:
    """Reading and saving it again can change it."""
    held, given = (folder / "tokenizer.json" for folder in (tiny_artifact / "tokenizer", tiny_llama.model_dir))
    assert held.read_bytes() == given.read_bytes()


def test_refuses_to_replace_without_being_told(tiny_llama: WrittenModel, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="exists"):
        lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, artifact)
    other = tmp_path / "folder"
    other.mkdir()
    (other / "precious.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, other, overwrite=True)
    assert (other / "precious.txt").read_text() == "x"


def test_overwrite_replaces_and_a_failed_convert_leaves_the_old_one(tiny_llama: WrittenModel, artifact: Path) -> None:
    with pytest.raises(ModelError):
        lragent.convert(artifact / "nowhere", tiny_llama.adapters, artifact, overwrite=True, compiled=False)
    assert open_artifact(artifact).manifest.compiled
    lragent.convert(
        tiny_llama.model_dir, {"one": tiny_llama.adapters["plan"]}, artifact, overwrite=True, compiled=False
    )
    assert [agent.name for agent in open_artifact(artifact).manifest.agents] == ["one"]
    assert not open_artifact(artifact).manifest.compiled
    assert [p.name for p in artifact.parent.iterdir()] == [artifact.name]


def test_another_format_version_names_both(artifact: Path) -> None:
    _edit(artifact, format=99)
    with pytest.raises(ArtifactError, match=f"format version 99, this lragent reads version {FORMAT}"):
        lragent.load(artifact, "base_lr_shared")


@pytest.mark.parametrize("text", ["{", "[]", f'{{"format": {FORMAT}}}'])
def test_damaged_manifest(artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest.json"):
        lragent.load(artifact, "base_lr_shared")


@pytest.mark.parametrize("wrong", [None, 5, "x"], ids=str)
def test_an_entry_of_another_kind_is_found(artifact: Path, wrong: object) -> None:
    whole = (artifact / "manifest.json").read_text()
    for name in ("agents", "layouts", "weights", "tokenizer", "compiled", "agent_slot_ranks", "sources"):
        _edit(artifact, **{name: wrong})
        with pytest.raises(ArtifactError, match="is damaged"):
            read_manifest(artifact)
        (artifact / "manifest.json").write_text(whole)


def test_a_manifest_that_was_changed_is_found(artifact: Path) -> None:
    file = artifact / "manifest.json"
    whole = file.read_text()
    for before, after in (('"rank": 4', '"rank": 3'), ('"page_size": ', '"page_size": -'), ('"float32"', '"float16"')):
        assert before in whole
        file.write_text(whole.replace(before, after, 1))
        with pytest.raises(ArtifactError, match=r"manifest\.json was changed after it was written"):
            lragent.load(artifact, "base_lr_shared")
    file.write_text(whole)
    read_manifest(artifact)


def test_a_manifest_without_its_seal_is_refused(artifact: Path) -> None:
    (artifact / "manifest.json").write_text(json.dumps(_entries(artifact)))
    with pytest.raises(ArtifactError, match=r"manifest\.json has no seal\n.*convert"):
        lragent.load(artifact, "base_lr_shared")


def test_every_entry_of_a_manifest_must_be_there(artifact: Path) -> None:
    whole = _entries(artifact)
    for name in whole.keys() - {"format"}:
        _write_sealed(artifact, {other: value for other, value in whole.items() if other != name})
        with pytest.raises(ArtifactError, match=rf"manifest\.json is damaged: .*missing entries \['{name}'\]"):
            read_manifest(artifact)
    split = whole["layouts"]["split"]
    for name in split:
        left = {other: value for other, value in split.items() if other != name}
        _write_sealed(artifact, {**whole, "layouts": {**whole["layouts"], "split": left}})
        with pytest.raises(ArtifactError, match=rf"manifest\.json is damaged: .*missing entries \['{name}'\]"):
            read_manifest(artifact)
    _write_sealed(artifact, whole)
    read_manifest(artifact)


def test_what_a_killed_convert_left_is_removed_and_what_another_one_writes_is_not(
    tiny_llama: WrittenModel, tmp_path: Path
) -> None:
    left, busy, other = (tmp_path / name for name in (".m.unfinished-left", ".m.unfinished-busy", ".m.mine"))
    for folder in (left, busy, other):
        folder.mkdir()
        (folder / "file").write_text("x")
    with directory_lock(busy), new_directory(tmp_path / "m", overwrite=False) as directory:
        (directory / "manifest.json").write_text("{}")
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, busy.name, "m"]


def test_an_artifact_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="exists"), new_directory(tmp_path / "m", overwrite=False):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "manifest.json").write_text("theirs")
    assert (tmp_path / "m" / "manifest.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="can't be written"), new_directory(tmp_path / "file" / "m", False):
        raise AssertionError("not reached")


def test_no_artifact_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact directory"):
        lragent.load(tmp_path / "nothing.lragent")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        lragent.load(tmp_path)


def test_damaged_files_are_found_before_anything_runs(artifact: Path) -> None:
    weights = artifact / "weights" / "base.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ArtifactError, match=rf"has {len(whole) - 8} bytes, the manifest says {len(whole)}"):
        lragent.load(artifact, "base_lr_shared")
    weights.write_bytes(whole)
    (package,) = artifact.glob("compiled/*/*.pt2")
    changed = bytearray(package.read_bytes())
    changed[1000] ^= 1
    package.write_bytes(bytes(changed))
    with pytest.raises(ArtifactError, match="the manifest says"):
        lragent.load(artifact, "base_lr_shared")
    package.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        lragent.load(artifact, "base_lr_shared")


def test_unknown_names(artifact: Path) -> None:
    for wrong in ({"sharing": "all_shared"}, {"backend": "jit"}, {"attention": "magic"}, {"kv_dtype": "int3"}):
        with pytest.raises(RequestError):
            lragent.load(artifact, **wrong)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["magic", "triton"])
def test_an_attention_that_can_not_be_had_is_refused_before_the_model_is_read(
    name: str, compiled: bool, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=rf"attention '{name}'.*\nUse auto, reference, torch, inductor(,| or) cpp"):
        lragent.convert(tmp_path / "nowhere", {}, tmp_path / "x.lragent", attention=name, compiled=compiled)


@pytest.mark.parametrize("name", ["auto", "cpp"])
def test_nothing_is_built_for_an_artifact_without_packages(
    name: str, tiny_llama: WrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> None:
        raise AssertionError("the C++ kernels are built")

    monkeypatch.setattr(cpp_library, "load", build)
    out = tmp_path / "m.lragent"
    report = lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out, attention=name, compiled=False)
    assert report.compiled == () and open_artifact(out).manifest.compiled == {}


def test_no_compiler(artifact: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    """Compiled code that is there needs no compiler; code that is missing says what to do."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    out = tmp_path / "new.lragent"
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        lragent.load(artifact, sharing="base_lr_shared", kv_memory="1MiB")
        with pytest.raises(CompilerMissing, match="compiler"):
            lragent.load(artifact, sharing="non_shared", kv_memory="1MiB")
        lragent.load(artifact, sharing="non_shared", kv_memory="1MiB", backend="eager")
        with pytest.raises(CompilerMissing, match="compiler"):
            lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out)
    assert not out.exists()


def test_a_package_for_another_machine_is_lowered_again_and_kept(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    _edit(artifact, compiled={"cpu-avx9-torch1.0-abi0": manifest["compiled"][target_name()]})
    lragent.load(artifact, "base_lr_shared", kv_memory="1MiB")
    assert set(open_artifact(artifact).manifest.compiled) == {"cpu-avx9-torch1.0-abi0", target_name()}
