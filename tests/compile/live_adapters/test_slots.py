"""Constants after adapters were written in place equal, to the bit, those of a program made with these adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lragent.artifact.adapter_map_file import read_map, write_map
from lragent.capture.capture import capture
from lragent.compile.export import tensors_of
from lragent.compile.live_adapters.a_digest import with_a_digests
from lragent.compile.live_adapters.slots import ConstantSlots
from lragent.errors import AdapterError
from lragent.loading.agent_slots import AgentSlots, agent_slots_of, fit
from lragent.loading.model import load_directories
from lragent.passes.pipeline import Transformed, transform
from lragent.program.adapter_map import AdapterMap
from lragent.program.agent import Agent
from lragent.program.cache_schema import Layout
from lragent.program.live_adapters import AdapterWeights, GivenAdapter, ReadAdapter
from tests.models import WrittenModel, write_model
from tests.models.variants import write_variants

Programs = tuple[dict[Layout, Transformed], tuple[Agent, ...]]


def programs(model_dir: Path, adapters: Mapping[str, Path], spare: int = 0) -> Programs:
    """Both rewritten programs, and the agents with their digests."""
    loaded = load_directories(model_dir, adapters)
    loaded = fit(loaded, agent_slots_of(loaded, spare)) if spare else loaded
    captured = capture(loaded)
    layouts: tuple[Layout, ...] = ("split", "dense")
    made = {layout: transform(captured, layout) for layout in layouts}
    return made, with_a_digests(loaded.agents, loaded.lora, made["split"].adapter_map)


def slots_of(program: Transformed, agents: tuple[Agent, ...], adapter_map: AdapterMap | None = None) -> ConstantSlots:
    return ConstantSlots(agents, adapter_map or program.adapter_map, tensors_of(program.graph), torch.float32)


def put(slots: ConstantSlots, given: Mapping[str, GivenAdapter]) -> list[ReadAdapter]:
    """Puts each adapter into its agent's slot."""
    places = {agent.name: (slot, agent) for slot, agent in enumerate(slots.agents, 1)}
    read = {places[name][0]: slots.read(places[name][1], adapter) for name, adapter in given.items()}
    live = set(range(1, len(slots.agents) + 1)) - set(read)
    for slot, adapter in read.items():
        error = slots.refusal(slot, adapter, live, {other: a for other, a in read.items() if other < slot})
        if error is not None:
            raise error
    slots.write(read)
    return list(read.values())


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3"])
def test_constants_are_those_of_a_fresh_program(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind, layers=1)
    swapped = {**written.adapters, "plan": written.adapters["reflect"], "reflect": written.adapters["plan"]}
    made, agents = programs(written.model_dir, written.adapters)
    fresh, fresh_agents = programs(written.model_dir, swapped)
    for layout, program in made.items():
        file = tmp_path / f"{layout}.safetensors"
        write_map(program.adapter_map, tmp_path, file.name)
        read = put(slots_of(program, agents, read_map(file)), {name: swapped[name] for name in ("plan", "reflect")})
        assert_equal(tensors_of(program.graph), tensors_of(fresh[layout].graph))
        assert [adapter.agent.digest for adapter in read] == [fresh_agents[0].digest, fresh_agents[2].digest]
        if layout == "split":
            assert [adapter.agent.a_digest for adapter in read] == [fresh_agents[0].a_digest, fresh_agents[2].a_digest]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> WrittenModel:
    return write_variants(
        tmp_path_factory.mktemp("variants"),
        "llama",
        {
            "plan": {},
            "other": {},
            "action": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 24}, "use_rslora": True},
            "small": {"r": 2, "target_modules": ["v_proj", "up_proj"]},
            "large": {"r": 6},
            "biased": {"lora_bias": True},
            "dora": {"use_dora": True},
            "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        },
    )


def test_smaller_adapters_also_in_a_spare_slot(variants: WrittenModel) -> None:
    """Ranks are padded, and modules that the adapter leaves out have B zero. Patterns and rsLoRA scale B."""
    dirs = variants.adapters
    made, agents = programs(variants.model_dir, {"plan": dirs["plan"], "action": dirs["other"]}, spare=1)
    loaded = load_directories(
        variants.model_dir, {"plan": dirs["plan"], "action": dirs["action"], "new": dirs["small"]}
    )
    held = AgentSlots(
        ("plan", "action", "new"),
        {routed.stream.module: routed.stream.ranks for routed in made["dense"].adapter_map.routed},
        {routed.stream.module: routed.stream.shares_a_with for routed in made["dense"].adapter_map.routed},
    )
    fresh = transform(capture(fit(loaded, held)), "split")
    slots = slots_of(made["split"], agents)
    put(slots, {"action": dirs["action"], "~1": dirs["small"]})
    assert_equal(slots.constants, tensors_of(fresh.graph))


def test_a_set_whose_shared_a_has_parted(variants: WrittenModel) -> None:
    dirs = variants.adapters
    made, agents = programs(variants.model_dir, {"plan": dirs["plan"], "action": dirs["plan"]})
    slots = slots_of(made["split"], agents)
    before = {name: tensor.clone() for name, tensor in slots.constants.items()}
    parted = r"new adapter of action has another A on .* than plan.*\nConvert again with separate A"
    for given in ({"action": dirs["other"]}, {"plan": dirs["plan"], "action": dirs["other"]}):
        with pytest.raises(AdapterError, match=parted):
            put(slots, given)
    assert_equal(slots.constants, before)
    put(slots, {"plan": dirs["other"], "action": dirs["other"]})
    fresh, _ = programs(variants.model_dir, {"plan": dirs["other"], "action": dirs["other"]})
    assert_equal(slots.constants, tensors_of(fresh["split"].graph))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("large", r"adapter plan has rank 6 on .*, its slot has rank 4\nConvert again"),
        ("biased", r"adapter plan .* has .*lora_B\.bias, which is not A or B of a LoRA layer\nPut it into an artifact"),
        ("dora", r"has .*lora_magnitude_vector, which is not A or B"),
        ("saved", r"has .*lm_head.*, which is not A or B"),
    ],
)
def test_what_only_convert_can_do(name: str, says: str, variants: WrittenModel) -> None:
    made, agents = programs(variants.model_dir, {"plan": variants.adapters["plan"]})
    slots = slots_of(made["split"], agents)
    with pytest.raises(AdapterError, match=says):
        put(slots, {"plan": variants.adapters[name]})


def test_slots_of_other_variants(variants: WrittenModel) -> None:
    dirs = {name: variants.adapters[name] for name in ("biased", "saved", "plan")}
    made, agents = programs(variants.model_dir, dirs)
    slots = slots_of(made["split"], agents)
    with pytest.raises(AdapterError, match="the slot of biased has a trained bias on"):
        put(slots, {"biased": dirs["plan"]})
    with pytest.raises(AdapterError, match="the slot of saved has DoRA magnitudes or replaced rows on lm_head"):
        put(slots, {"saved": {"model.layers.0.self_attn.q_proj": (torch.ones(4, 64), torch.ones(64, 4))}})
    put(slots, {"plan": dirs["plan"]})


def test_weights_in_memory(variants: WrittenModel) -> None:
    made, agents = programs(variants.model_dir, {"plan": variants.adapters["plan"]})
    slots = slots_of(made["dense"], agents)
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    a, b = torch.randn(4, 64), torch.randn(64, 4, dtype=torch.float64, requires_grad=True)
    assert agents[0].scalings == (2.0,)
    alone = slots.read(agents[0], {q: (a, b)})
    assert alone.agent == slots.read(agents[0], AdapterWeights({q: (a, b)}, 2.0)).agent
    assert torch.equal(alone.matrices[q][1], 2 * b.detach().float())
    own = slots.read(agents[0], AdapterWeights({q: (a, b), k: (a, b[:32])}, {q: 0.5, k: 3}))
    assert own.agent.scalings == (0.5, 3.0)
    for given, says in (
        ({"model.other": (a, b)}, "adapts model.other, which no agent of the program adapts"),
        ({q: (a, b[:32])}, r"have shapes \[4, 64\] and \[32, 4\], the module has 64 inputs and 64 outputs"),
        ({q: (a * float("nan"), b)}, "infinite values or NaN as its lora_A"),
        ({}, "adapts no module"),
        (AdapterWeights({q: (a, b)}, {k: 1.0}), f"has no scaling for {q}"),
    ):
        with pytest.raises(AdapterError, match=says):
            slots.read(agents[0], given)
    with pytest.raises(AdapterError, match="has several scalings by module"):
        slots.read(own.agent, {q: (a, b)})
