"""After `Engine.update_adapters` an engine computes what one that was converted from the new adapters does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lragent
from lragent.errors import AdapterError, RequestError
from lragent.files.checked_file import sha256_of
from lragent.runtime.engine import Engine
from lragent.runtime.update_adapters import VersionInUse
from tests.models import WrittenModel
from tests.models.variants import write_variants
from tests.oracle.peft_oracle import load_peft
from tests.oracle.sharing_oracle import SCHEMES

PROMPT = [(7 * i + 5) % 120 for i in range(84)]  # two pages and a part of one, which the turns fill
TURNS = (("plan", 3), ("action", 3), ("plan", 3), ("base", 2), ("action", 6))
Found = list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    """Adapters of one shape; `plan_b` has the A of `plan`."""
    configs: dict[str, dict[str, Any]] = {name: {} for name in ("plan", "action", "plan_new", "action_new", "plan_b")}
    written = write_variants(tmp_path_factory.mktemp("update"), "llama", configs)
    tensors = [load_file(written.adapters[name] / "adapter_model.safetensors") for name in ("plan", "plan_b")]
    mixed = {key: (tensors[0] if "lora_A" in key else tensors[1])[key] for key in tensors[1]}
    save_file(mixed, written.adapters["plan_b"] / "adapter_model.safetensors", metadata={"format": "pt"})
    return written


class Fresh:
    """Turns of engines that were converted from a set of adapters, each converted when it is first asked for."""

    def __init__(self, written: WrittenModel, folder: Path) -> None:
        self.written, self.folder = written, folder
        self.found: dict[tuple[str, ...], tuple[Found, dict[str, str]]] = {}

    def artifact(self, spare: int = 0, **adapters: str) -> Path:
        out = self.folder / f"{'-'.join(adapters.values())}-{spare}.lragent"
        if not out.exists():
            given = {name: self.written.adapters[source] for name, source in adapters.items()}
            lragent.convert(self.written.model_dir, given, out, spare=spare, compiled=False)
        return out

    def turns(self, sharing: str, **adapters: str) -> tuple[Found, dict[str, str]]:
        """Turns, and the agents' digests."""
        key = (sharing, *adapters.values())
        if key not in self.found:
            engine = lragent.load(self.artifact(**adapters), sharing=sharing, backend="eager", kv_memory="4MiB")
            self.found[key] = turns_of(engine), {agent.name: agent.digest for agent in engine.program.agents}
        return self.found[key]


@pytest.fixture(scope="module")
def fresh(written: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(written, tmp_path_factory.mktemp("fresh"))


def turns_of(engine: Engine, prompt: list[int] = PROMPT) -> Found:
    with engine.trajectory(prompt) as t:
        turns = [t.generate(name, max_new_tokens=count, ignore_eos=True) for name, count in TURNS]
        digests = {agent.name: agent.digest for agent in engine.program.agents} | {"base": ""}
        assert [span.adapter for span in t.record().generated] == [digests[name] for name, _ in TURNS]
    engine.check_integrity()
    return [(turn.token_ids, turn.logprobs) for turn in turns]


def assert_same(found: Found, expected: Found) -> None:
    """Greedy tokens are equal; log-probabilities differ by no more than float32 sums in another order."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, left), (_, right) in zip(found, expected, strict=True):
        assert left == pytest.approx(right, abs=2e-5)


def in_memory(written: WrittenModel, name: str) -> lragent.AdapterWeights:
    """An adapter's matrices as a trainer has them."""
    tensors = load_file(written.adapters[name] / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    pairs = {
        module: tuple(tensors[f"base_model.model.{module}.lora_{side}.weight"].requires_grad_() for side in "AB")
        for module in modules
    }
    return lragent.AdapterWeights(pairs, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", SCHEMES)
def test_with_a_warm_cache(
    sharing: str, written: WrittenModel, fresh: Fresh, open_engine: Callable[..., Engine]
) -> None:
    """One agent, then all at once; from a directory and from memory. The artifact's files stay as they are."""
    artifact = fresh.artifact(plan="plan", action="action")
    files = {path: sha256_of(path) for path in artifact.rglob("*") if path.is_file()}
    engine = open_engine(artifact, sharing)
    old, _ = fresh.turns(sharing, plan="plan", action="action")
    assert_same(turns_of(engine), old)
    updates: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"action": written.adapters["action_new"]}, {"plan": "plan", "action": "action_new"}),
        (
            {"plan": in_memory(written, "plan_new").matrices, "action": str(written.adapters["action"])},
            {"plan": "plan_new", "action": "action"},
        ),
    ]
    for given, adapters in updates:
        digests = engine.update_adapters(given)
        expected, fresh_digests = fresh.turns(sharing, **adapters)
        assert digests == {name: fresh_digests[name] for name in given}
        assert_same(turns_of(engine), expected)
    assert {path: sha256_of(path) for path in files} == files
    assert "updated adapters" in engine.program.identity()


@pytest.mark.parametrize("sharing", SCHEMES)
def test_versions_under_open_trajectories(
    sharing: str, written: WrittenModel, fresh: Fresh, open_engine: Callable[..., Engine]
) -> None:
    """Three versions of an agent at once; a slot is spare again when the last trajectory that used it closes."""
    engine = open_engine(fresh.artifact(plan="plan", action="action", spare=2), sharing, spare=2)
    assert engine.agents == ("base", "plan", "action")
    versions = ("plan", "plan_new", "plan_b")
    expected = {name: fresh.turns(sharing, plan=name, action="action") for name in versions}
    opened = [engine.trajectory(PROMPT) for _ in versions]
    found: list[list[Any]] = [[] for _ in versions]
    for number, name in enumerate(versions):
        if number:
            engine.update_adapters({"plan": written.adapters[name]})
        found[number].append(opened[number].generate("plan", max_new_tokens=TURNS[0][1], ignore_eos=True))
    with pytest.raises(VersionInUse, match="1 open trajectories use the present adapter of plan"):
        engine.update_adapters({"plan": written.adapters["plan_new"]})
    for agent, count in TURNS[1:]:  # turn by turn, so that the versions take turns on the cache
        for t, turns in zip(opened, found, strict=True):
            turns.append(t.generate(agent, max_new_tokens=count, ignore_eos=True))
    for name, t, turns in zip(versions, opened, found, strict=True):
        wanted, digests = expected[name]
        assert_same([(turn.token_ids, turn.logprobs) for turn in turns], wanted)
        assert {span.adapter for span in t.record().generated if span.agent == "plan"} == {digests["plan"]}
        assert {span.adapter for span in t.record().written if span.agent == "plan"} <= {digests["plan"]}
    opened[1].close()
    engine.update_adapters({"plan": written.adapters["plan_new"]})  # takes the slot of the closed trajectory's version
    assert_same(turns_of(engine), expected["plan_new"][0])
    with opened[0].fork() as branch, branch.fork() as second:
        opened[0].close()
        assert branch.score("plan", [1, 2]) == pytest.approx(second.score("plan", [1, 2]), abs=1e-6)
    opened[2].close()
    assert_same(turns_of(engine), expected["plan_new"][0])
    assert engine.stats().pages_held == 0


@pytest.mark.parametrize("sharing", ["base_lr_shared", "neutral_shared"])
def test_a_version_with_the_same_a_takes_no_cache(
    sharing: str, written: WrittenModel, fresh: Fresh, open_engine: Callable[..., Engine]
) -> None:
    """Its low-rank values are those of the version before; under `neutral_shared` the whole cache stays."""
    artifact = fresh.artifact(plan="plan", action="action", spare=1)
    engine, plain = open_engine(artifact, sharing), open_engine(fresh.artifact(plan="plan", action="action"), sharing)
    assert engine.stats().page_bytes == plain.stats().page_bytes
    t = engine.trajectory(PROMPT)
    t.generate("plan", max_new_tokens=3, ignore_eos=True)
    with pytest.raises(VersionInUse):
        engine.update_adapters({"plan": written.adapters["plan_new"]})
    engine.update_adapters({"plan": written.adapters["plan_b"]})
    with engine.trajectory(PROMPT) as new:
        reused = new.generate("plan", max_new_tokens=1, ignore_eos=True).usage.reused
        assert reused == (64 if sharing == "neutral_shared" else 0)
    assert_same(turns_of(engine), fresh.turns(sharing, plan="plan_b", action="action")[0])
    turn = t.generate("action", max_new_tokens=3, ignore_eos=True)
    assert turn.token_ids == fresh.turns(sharing, plan="plan", action="action")[0][1][0]
    t.close()
    # The old slot's block is read by the version in the other slot, until another A comes.
    engine.update_adapters({"plan": written.adapters["plan"]})
    assert_same(turns_of(engine), fresh.turns(sharing, plan="plan", action="action")[0])
    engine.update_adapters({"plan": written.adapters["plan_new"]})
    assert_same(turns_of(engine), fresh.turns(sharing, plan="plan_new", action="action")[0])


def test_a_shared_a_stays_shared_or_is_refused(
    written: WrittenModel, fresh: Fresh, open_engine: Callable[..., Engine]
) -> None:
    """Also where both agents' newest versions lie in spare slots and read the blocks of the slots that share an A."""
    engine = open_engine(fresh.artifact(plan="plan", action="plan_b", spare=2), "base_lr_shared")
    parted = r"has another A on .* than .*\nConvert again with separate A"
    dirs = written.adapters
    for given in ({"action": dirs["action"]}, {"plan": dirs["plan_new"], "action": dirs["action"]}):
        with pytest.raises(AdapterError, match=parted):
            engine.update_adapters(given)
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=1)
        t.generate("action", max_new_tokens=1)
        engine.update_adapters({"plan": dirs["plan_b"], "action": dirs["plan"]})
        assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan_b", action="plan")[0])
    with pytest.raises(AdapterError, match=parted):
        engine.update_adapters({"plan": dirs["plan_new"]})
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan_b", action="plan")[0])
    engine.update_adapters({"plan": dirs["plan_new"], "action": dirs["plan_new"]})
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan_new", action="plan_new")[0])


def test_on_any_error_nothing_has_changed(
    written: WrittenModel, fresh: Fresh, open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = open_engine(fresh.artifact(plan="plan", action="action"), "base_lr_shared")
    old = turns_of(engine)
    bad: Mapping[str, Any] = {"lm_head": (torch.zeros(4, 64), torch.zeros(128, 4))}
    for given, kind, says in (
        ({"plan": written.adapters["plan_new"], "action": bad}, AdapterError, "lm_head, which no agent of the program"),
        ({"plan": written.adapters["plan_new"], "other": bad}, RequestError, "unknown agent 'other'"),
        ({"plan": tmp_path}, AdapterError, "has no adapter_config.json"),
    ):
        with pytest.raises(kind, match=says):
            engine.update_adapters(given)  # type: ignore[arg-type]
        assert_same(turns_of(engine), old)
    with pytest.raises(RequestError, match="spare is 1, the program has 0 spare agent slots"):
        open_engine(fresh.artifact(plan="plan", action="action"), "base_lr_shared", spare=1)


def test_an_engine_of_a_live_model(written: WrittenModel, fresh: Fresh, tmp_path: Path) -> None:
    """The caller's model keeps its weights."""
    dirs = {name: written.adapters[name] for name in ("plan", "action")}
    model = load_peft(written.model_dir, dirs, torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = lragent.optimize(model, sharing="base_lr_shared", backend="eager", kv_memory="4MiB", spare=1)
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=2)
        engine.update_adapters({"plan": written.adapters["plan_b"]})
    engine.update_adapters({"plan": written.adapters["plan_new"]})
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan_new", action="action")[0])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(RequestError, match="adapters were updated"):
        engine.save(tmp_path / "x.lragent")


@pytest.mark.integration
@pytest.mark.parametrize("unit", ["model", "layer"])
def test_compiled_packages_read_the_new_weights(unit: str, written: WrittenModel, fresh: Fresh, tmp_path: Path) -> None:
    out = tmp_path / "m.lragent"
    dirs = {name: written.adapters[name] for name in ("plan", "action")}
    lragent.convert(written.model_dir, dirs, out, layouts=("split",), unit=unit, spare=1)
    files = {path: sha256_of(path) for path in out.rglob("*") if path.is_file()}
    engine = lragent.load(out, sharing="base_lr_shared", kv_memory="4MiB", spare=1)
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan", action="action")[0])
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=2, ignore_eos=True)
        engine.update_adapters({"plan": in_memory(written, "plan_new"), "action": written.adapters["action_new"]})
        expected = fresh.turns("base_lr_shared", plan="plan_new", action="action_new")[0]
        assert_same(turns_of(engine), expected)
    engine.update_adapters({"plan": written.adapters["plan"], "action": written.adapters["action"]})
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan", action="action")[0])
    assert {path: sha256_of(path) for path in files} == files


@pytest.mark.integration
def test_a_compiled_engine_of_a_live_model(written: WrittenModel, fresh: Fresh) -> None:
    model = load_peft(written.model_dir, {name: written.adapters[name] for name in ("plan", "action")}, torch.float32)
    engine = lragent.optimize(model, sharing="base_lr_shared", kv_memory="4MiB")
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan", action="action")[0])
    engine.update_adapters({"plan": written.adapters["plan_new"]})
    assert_same(turns_of(engine), fresh.turns("base_lr_shared", plan="plan_new", action="action")[0])
