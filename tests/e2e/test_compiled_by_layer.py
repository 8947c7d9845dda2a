"""unit="layer": one package for each kind of layer computes what one package for the model does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import fx

import lragent
from lragent.artifact.directory import open_artifact
from lragent.artifact.manifest import read_manifest, write_manifest
from lragent.compile.compile import compile_graph, load_compiled, target_name
from lragent.compile.export import CPU, example_step
from lragent.compile.segments.plan import read_plan
from lragent.errors import ArtifactError, RequestError
from lragent.files.checked_file import describe_file
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import STEP_INPUTS
from lragent.runtime.engine import Engine
from tests.e2e.scripts import SCRIPT, assert_equals_oracle, run_on_engine
from tests.models import WrittenModel, write_model

pytestmark = pytest.mark.integration  # each test compiles for longer than 20 s

PROMPT = [5, 40, 77, 12, 90, 33]


@pytest.fixture(scope="module")
def by_layer(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama compiled by layer; read only."""
    out = tmp_path_factory.mktemp("by-layer") / "tiny.lragent"
    report = lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out, layouts=("split",), unit="layer")
    assert report.unit_refusal == ""
    return out


@pytest.fixture
def artifact(by_layer: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(by_layer, tmp_path / "copy.lragent"))


def _plan(artifact: Path) -> Path:
    (entry,) = open_artifact(artifact).manifest.compiled[target_name()].values()
    return artifact / entry.path


def _turn(engine: Engine, agent: str) -> tuple[list[int], list[float]]:
    with engine.trajectory(PROMPT) as t:
        turn = t.generate(agent, max_new_tokens=8, ignore_eos=True)
        return turn.token_ids, turn.logprobs


def test_computes_what_the_whole_model_does(by_layer: Path, tiny_artifact: Path, tiny_llama: WrittenModel) -> None:
    plan = read_plan(_plan(by_layer))
    # Embedding, a layer, head; the layer is called twice.
    assert [call.package for call in plan.calls] == [0, 1, 1, 2]
    assert len(plan.packages) == len(list(by_layer.glob("compiled/*/*/*.pt2"))) == 3
    engine = lragent.load(by_layer, "base_lr_shared", kv_memory="4MiB")
    assert_equals_oracle(tiny_llama, "base_lr_shared", SCRIPT, run_on_engine(engine, SCRIPT))
    whole = lragent.load(tiny_artifact, "base_lr_shared", kv_memory="4MiB")
    for agent in ("plan", "action", "base"):
        (tokens, found), (expected_tokens, expected) = _turn(engine, agent), _turn(whole, agent)
        assert tokens == expected_tokens
        # Float32 sums of at most 128 products, twice through two layers.
        assert found == pytest.approx(expected, abs=1e-5)


def test_layers_of_two_kinds_compiled_at_the_first_load(tmp_path: Path) -> None:
    """Sliding and full attention take turns. The artifact says how it is compiled on a machine that it is new to."""
    written, out = write_model(tmp_path, "gemma3_text", layers=4), tmp_path / "m.lragent"
    lragent.convert(written.model_dir, written.adapters, out, unit="layer", compiled=False)
    engine = lragent.load(out, "base_lr_shared", kv_memory="4MiB")
    assert [call.package for call in read_plan(_plan(out)).calls] == [0, 1, 2, 1, 2, 3]
    assert_equals_oracle(written, "base_lr_shared", SCRIPT, run_on_engine(engine, SCRIPT))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        again = lragent.load(out, "base_lr_shared", kv_memory="4MiB")
    assert _turn(again, "plan") == _turn(engine, "plan")


def test_damaged_segments_are_found_before_anything_runs(artifact: Path) -> None:
    plan = _plan(artifact)
    package = plan.parent / read_plan(plan).packages[1].path
    whole = package.read_bytes()
    changed = bytearray(whole)
    changed[1000] ^= 1
    package.write_bytes(bytes(changed))
    with pytest.raises(ArtifactError, match=r"segment-1\.pt2 has sha256 .*, the manifest says"):
        lragent.load(artifact, "base_lr_shared")
    package.write_bytes(whole[:-8])
    with pytest.raises(ArtifactError, match=rf"has {len(whole) - 8} bytes"):
        lragent.load(artifact, "base_lr_shared")
    package.unlink()
    with pytest.raises(ArtifactError, match=r"segment-1\.pt2 is missing"):
        lragent.load(artifact, "base_lr_shared")
    plan.write_text(plan.read_text().replace("segment-1", "segment-2"))
    with pytest.raises(ArtifactError, match=r"plan\.json has sha256"):
        lragent.load(artifact, "base_lr_shared")


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"format": 2}, "format 2, expected 1"), ({"result": "value:x"}, "names 'value:x'"), ({"calls": 1}, "TypeError")],
)
def test_a_plan_that_means_nothing(artifact: Path, changes: dict[str, object], says: str) -> None:
    """With a manifest that vouches for it."""
    plan = _plan(artifact)
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **changes}))
    manifest = read_manifest(artifact)
    ((key, _),) = manifest.compiled[target_name()].items()
    entry = describe_file(artifact, str(plan.relative_to(artifact)))
    write_manifest(dataclasses.replace(manifest, compiled={target_name(): {key: entry}}), artifact)
    with pytest.raises(ArtifactError, match=f"plan.json is damaged: .*{says}"):
        lragent.load(artifact, "base_lr_shared")


def test_packages_stay_when_adapters_change(
    artifact: Path, tiny_llama: WrittenModel, open_engine: Callable[..., Engine]
) -> None:
    """By update, and when the model is converted over the artifact; not when another unit is asked for."""
    swapped = {**tiny_llama.adapters, "plan": tiny_llama.adapters["reflect"], "reflect": tiny_llama.adapters["plan"]}
    before = _plan(artifact)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        lragent.update(artifact, tiny_llama.model_dir, swapped)
        assert _plan(artifact) == before
        found = _turn(lragent.load(artifact, "base_lr_shared", kv_memory="1MiB"), "plan")
        expected = _turn(open_engine(artifact, "base_lr_shared"), "plan")
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], abs=1e-5)
        options = {"overwrite": True, "compiled": False}
        lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, artifact, unit="layer", **options)
        assert _plan(artifact) == before
        assert _turn(lragent.load(artifact, "base_lr_shared", kv_memory="1MiB"), "reflect")[0] == found[0]
        lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, artifact, unit="model", **options)
    assert not open_artifact(artifact).manifest.compiled


def test_a_graph_that_can_not_be_cut_is_compiled_whole_and_says_why(tmp_path: Path) -> None:
    """No attention op: there is nothing to repeat."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in STEP_INPUTS}
    graph.output(
        graph.call_function(torch.ops.aten.index_select.default, (inputs["token_ids"], 0, inputs["logits_rows"]))
    )
    schema = CacheSchema("dense", ("one",), (), ())
    module = fx.GraphModule(torch.nn.Module(), graph)
    compiled = compile_graph(module, schema, torch.float32, "torch", "layer", tmp_path)
    assert (compiled.file.name, compiled.refusal) == ("program.pt2", "the graph has no attention op")
    step = example_step(1)
    step.token_ids.copy_(torch.arange(6))
    assert torch.equal(load_compiled(compiled.file, schema, {}, CPU)(*step.tensors()), step.logits_rows)


def test_unknown_unit(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown unit 'block'\nUse model or layer"):
        lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, tmp_path / "m.lragent", unit="block")
