"""Other adapters in the agent slots of the toy model: those of a toy model of another seed, written in place."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from lragent.errors import AdapterError
from lragent.program.agent import Agent
from lragent.program.live_adapters import ReadAdapter
from lragent.runtime import Engine, EngineConfig
from tests.runtime.random_operations import SteadyCheck
from tests.runtime.toy_program import AGENTS, ToyModel, toy_model, toy_program

FIELDS = ("delta_q", "a_k", "b_k", "a_v", "b_v")


def sha(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def agent_of(model: ToyModel, slot: int) -> Agent:
    """The agent in a slot, with the digests of its weights."""
    own = [getattr(layer, field)[slot] for layer in model.layers for field in FIELDS]
    a = [getattr(layer, field)[slot] for layer in model.layers for field in ("a_k", "a_v")]
    return Agent(AGENTS[slot - 1], sha(*own), a_digest=sha(*a))


def with_adapters(
    model: ToyModel, other: ToyModel, slots: Collection[int], fields: Collection[str] = FIELDS
) -> ToyModel:
    """A copy of a model with adapters of another one in some slots; only `fields` of them."""
    made = copy.deepcopy(model)
    for layer, source in zip(made.layers, other.layers, strict=True):
        for field in fields:
            for slot in slots:
                getattr(layer, field)[slot].copy_(getattr(source, field)[slot])
    return made


class ToySlots:
    """See `lragent.program.live_adapters.AdapterSlots`. An adapter is given as the model that has it."""

    def __init__(self, model: ToyModel) -> None:
        self.model = model

    def read(self, present: Agent, given: Any) -> ReadAdapter:
        slot = AGENTS.index(present.name) + 1
        pairs = {
            f"{layer}.{field}": (getattr(source, field)[slot], torch.empty(0))
            for layer, source in enumerate(given.layers)
            for field in FIELDS
        }
        return ReadAdapter(agent_of(given, slot), pairs)

    def refusal(
        self, slot: int, adapter: ReadAdapter, live: Collection[int], others: Mapping[int, ReadAdapter]
    ) -> AdapterError | None:
        own = AGENTS.index(adapter.agent.name) + 1
        return None if slot == own else AdapterError(f"{adapter.agent.name} has no slot but its own")

    def write(self, adapters: Mapping[int, ReadAdapter]) -> None:
        for slot, adapter in adapters.items():
            for index, layer in enumerate(self.model.layers):
                for field in FIELDS:
                    getattr(layer, field)[slot].copy_(adapter.matrices[f"{index}.{field}"][0])


def updatable_engine(scheme: str, model: ToyModel) -> Engine:
    """A toy engine over a copy of a model, whose adapters can be updated."""
    own = copy.deepcopy(model)
    program = toy_program("dense" if scheme in ("non_shared", "full_shared") else "split", own)
    agents = tuple(agent_of(own, slot) for slot in range(1, len(AGENTS) + 1))
    config = EngineConfig(scheme, "10MB", 512, 4, torch.float64)
    engine = Engine(replace(program, agents=agents, adapters=ToySlots(own)), config)
    engine.on_step = SteadyCheck(engine)
    return engine


OTHER = toy_model(seed=1)
