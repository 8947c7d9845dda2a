import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lragent
from lragent.artifact.build import ConvertReport
from lragent.errors import Miss, SplitRefused
from lragent.graph.passes import Pass, PassReport
from lragent.passes import REWRITE, pipeline
from lragent_cli.convert import print_report
from tests.cli.conftest import adapters_option, call
from tests.coverage.tiny_model import adapted_model, plain_model
from tests.models import WrittenModel


def test_convert_writes_an_artifact_and_inspect_reads_it(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    out = tmp_path / "m.lragent"
    arguments = ("convert", tiny_llama.model_dir, "--adapters", adapters_option(tiny_llama), "-o", out)
    converted = call(*arguments, "--layouts", "none", "--unit", "layer", "--json")
    assert converted.code == 0, converted.err
    report = converted.json()
    assert report["agents"] == ["plan", "action", "reflect"] and report["out"] == str(out)
    assert report["compiled"] == [] and report["refusal"] == "" and report["seconds"]["load"] > 0

    again = call(*arguments, "--layouts", "none")
    assert again.code == 1
    assert "hint: " in again.err and "--overwrite" in again.err

    shown = call("inspect", out)
    assert shown.code == 0, shown.err
    for text in ("agent action: rank 8", "rotary", "base_lr_shared", "3 agents", "0-1"):
        assert text in shown.out


def test_inspect_of_a_model_is_a_dry_run_that_agrees_with_its_artifact(
    tiny_llama: WrittenModel, eager_artifact: Path
) -> None:
    dry = call("inspect", tiny_llama.model_dir, "--adapters", adapters_option(tiny_llama), "--memory", "1MiB", "--json")
    artifact = call("inspect", eager_artifact, "--memory", "1MiB", "--json").json()
    found = dry.json()
    assert {key for key in artifact if artifact[key] != found[key]} == {"source"}
    one_agent, two_agents, three_agents = artifact["bytes_per_token"]["non_shared"]
    assert (two_agents, three_agents) == (2 * one_agent, 3 * one_agent)
    assert artifact["tokens_that_fit"]["non_shared"] == [2**20 // n for n in (one_agent, two_agents, three_agents)]
    assert artifact["memory"] == 2**20


def test_update_adds_an_agent_to_a_spare_slot(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    out = tmp_path / "m.lragent"
    first = f"plan={tiny_llama.adapters['plan']},action={tiny_llama.adapters['action']}"
    written = call(
        "convert", tiny_llama.model_dir, "--adapters", first, "-o", out, "--layouts", "none", "--spare", 1, "--json"
    )
    assert written.json()["agents"] == ["plan", "action"]
    assert "1 spare slots for agents" in call("inspect", out).out
    every = adapters_option(tiny_llama)
    updated = call("convert", tiny_llama.model_dir, "--adapters", every, "-o", out, "--update", "--json")
    assert updated.code == 0, updated.err
    assert updated.json()["agents"] == ["plan", "action", "reflect"]
    shown = call("inspect", out).out
    assert "agent reflect: rank 4" in shown and "spare" not in shown
    assert "base_lr_shared takes less than non_shared: once 2 agents have seen a token" in shown
    refused = call("convert", tiny_llama.model_dir, "--adapters", every, "-o", out, "--update", "--spare", 1)
    assert refused.code == 2 and "--update" in refused.err
    refused = call("convert", tiny_llama.model_dir, "--adapters", every, "-o", out, "--update", "--unit", "layer")
    assert refused.code == 2 and "--unit" in refused.err


def test_adapters_without_names_take_their_folders(tiny_llama: WrittenModel) -> None:
    folders = ",".join(map(str, tiny_llama.adapters.values()))
    found = call("inspect", tiny_llama.model_dir, "--adapters", folders, "--json").json()
    assert [agent["name"] for agent in found["agents"]] == ["plan", "action", "reflect"]


def test_the_report_says_what_was_refused() -> None:
    shown = Console(record=True, file=io.StringIO())
    print_report(
        ConvertReport(
            Path("m.lragent"),
            ("plan", "b"),
            {"capture": 72.0},
            (),
            "layer 3: [why]",
            unit_refusal="it has [none]",
            tokenizer=("[none] was found",),
            misses={"dense": (Miss("layer 0", "a", "[so]"), Miss("logits", "b", "not"), Miss("layer 1", "c", "[so]"))},
        ),
        shown,
    )
    lines = [line.rstrip() for line in shown.export_text().splitlines()]
    assert lines[0] == "wrote m.lragent for plan, b"
    assert lines[1].split() == ["capture", "1", "min", "12", "s"]
    assert lines[2] == "not matched, dense: [so]: layer 0 (node a), layer 1 (node c)"
    assert lines[3] == "not matched, dense: not: logits (node b)"
    assert lines[4].endswith("only non_shared and full_shared work: layer 3: [why]")
    assert "tokenizer: [none] was found" in lines
    assert lines[5] == "compiled whole, not by layer: it has [none]"


@pytest.fixture
def wide_norm(tmp_path: Path) -> WrittenModel:
    """A model whose keys have one norm over all heads."""
    plain_model("olmo2").save_pretrained(tmp_path / "model")
    adapted_model("olmo2").save_pretrained(tmp_path / "adapters")
    return WrittenModel(tmp_path / "model", {name: tmp_path / "adapters" / name for name in ("plan", "action")})


def test_layers_that_run_another_attention_are_listed(wide_norm: WrittenModel, tmp_path: Path) -> None:
    out = tmp_path / "m.lragent"
    named = adapters_option(wide_norm)
    arguments = ("convert", wide_norm.model_dir, "--adapters", named, "-o", out, "--layouts", "none")
    converted = call(*arguments, "--attention", "inductor")
    assert converted.code == 0, converted.err
    for graph in ("inductor_decode", "inductor_prefill"):
        (line,) = [line for line in converted.out.splitlines() if graph in line]
        assert line.startswith(f"not matched, split: {graph} has no norm over all heads; runs torch: layer 0 (node ")
        assert "layer 1 (node " in line
    assert "cpp has no norm" not in converted.out
    as_json = call(*arguments, "--attention", "inductor", "--overwrite", "--json").json()["misses"]
    assert [miss["where"] for miss in as_json["split"]] == ["layer 0", "layer 1"] * 2
    assert set(as_json) == {"split"} and set(as_json["split"][0]) == {"where", "node", "reason"}

    dry = call("inspect", wide_norm.model_dir, "--adapters", named)
    for shown in (dry, call("inspect", out)):
        assert shown.code == 0, shown.err
        for graph in ("cpp", "triton", "inductor_decode", "inductor_prefill"):
            assert f"not matched, split: {graph} has no norm over all heads; runs torch: layer 0 (node " in shown.out
    found = call("inspect", wide_norm.model_dir, "--adapters", named, "--json").json()
    assert found["misses"] == call("inspect", out, "--json").json()["misses"]

    updated = call("convert", wide_norm.model_dir, "--adapters", named, "-o", out, "--update", "--json")
    assert updated.code == 0 and updated.json()["misses"] == {}
    assert call("inspect", out, "--json").json()["misses"] == found["misses"]


MISSES = tuple(Miss(f"layer {index} key", f"node_{index}", "no reason") for index in range(6))


@pytest.fixture
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A required pass misses six places, in the layouts of the fixture's parameter."""
    layouts: tuple[str, ...] = request.param

    def run(graph: Any, context: Any) -> PassReport:
        return PassReport(0, MISSES if context.layout in layouts else ())

    monkeypatch.setattr(pipeline, "REWRITE", (Pass("invented", run, required=True, hint="Do this."), *REWRITE))


@pytest.mark.parametrize("refused", [("split",)], indirect=True)
def test_every_place_of_a_refused_layout_is_shown(refused: None, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    out, named = tmp_path / "m.lragent", adapters_option(tiny_llama)
    lragent.convert(tiny_llama.model_dir, tiny_llama.adapters, out, layouts=("dense",), compiled=False)
    for arguments in ((tiny_llama.model_dir, "--adapters", named), (out,)):
        shown = call("inspect", *arguments)
        assert shown.code == 0, shown.err
        assert "and 2 more; `lragent inspect MODEL --adapters ...` lists all" in shown.out
        (line,) = [line for line in shown.out.splitlines() if line.startswith("not matched")]
        assert line.startswith("not matched, split: no reason: ")
        assert all(f"{miss.where} (node {miss.node})" in line for miss in MISSES)
        found = call("inspect", *arguments, "--json").json()["misses"]
        assert found == {"split": [dataclasses.asdict(miss) for miss in MISSES]}
    with pytest.raises(SplitRefused) as error:
        lragent.load(out, "base_lr_shared")
    assert error.value.misses == MISSES


@pytest.mark.parametrize("refused", [("split", "dense")], indirect=True)
def test_every_place_of_a_refused_model_is_shown(refused: None, tiny_llama: WrittenModel) -> None:
    arguments = ("inspect", tiny_llama.model_dir, "--adapters", adapters_option(tiny_llama))
    shown = call(*arguments)
    assert shown.code == 1
    assert [line.strip() for line in shown.out.splitlines()] == [str(miss) for miss in MISSES]
    assert "hint: Do this." in shown.err and "and 2 more" in shown.err
    as_json = call(*arguments, "--json")
    assert as_json.code == 1
    assert as_json.json()["refused"] == [dataclasses.asdict(miss) for miss in MISSES]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("inspect", "nowhere.lragent"), "no artifact directory at nowhere.lragent"),
        (("inspect", "nowhere.lragent", "--memory", "much"), "'much' is not an amount of memory"),
        (("convert", "nowhere", "--adapters", "plan=nowhere", "-o", "x.lragent"), "nowhere"),
    ],
    ids=["artifact", "memory", "model"],
)
def test_what_is_missing_is_one_line(arguments: tuple[str, ...], found: str) -> None:
    outcome = call(*arguments)
    assert outcome.code == 1
    lines = [line for line in outcome.err.splitlines() if not line.startswith("converting: ")]  # stages, off a terminal
    assert lines[0].startswith("error: ") and found in lines[0]
    assert len(lines) == 2
