"""Agent slots of a program: which adapters can be swapped in without recompiling.

On each adapted module, an agent slot has a rank and either its own A or the A of another slot. An adapter fits if it
adapts no other modules, has no larger rank on any, and shares its A where the slot does. Smaller ranks are padded with
zeros. A slot without adapter is spare; no agent can act in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.errors import AdapterError
from lragent.loading.adapter_weights import LoraWeights
from lragent.loading.model import LoadedModel
from lragent.program.agent import Agent

SPARE = "~"  # first character of a spare slot's name; names of agents can't contain it


@dataclass(frozen=True)
class AgentSlots:
    """The agent slots of one program.

    Args:
        names: agent of each slot, in order; `~1`, `~2`, ... for spare slots.
        ranks: module FQN -> rank of each slot; 0 where the slot does not adapt the module.
        groups: module FQN -> for each slot, index of the first slot with the same A (its own index if none).
    """

    names: tuple[str, ...]
    ranks: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, tuple[int, ...]]


def agent_slots_of(loaded: LoadedModel, spare: int) -> AgentSlots:
    """Makes one slot per agent, and `spare` slots with the largest rank of any agent on each module."""
    agents = [agent.name for agent in loaded.agents]
    ranks, groups = {}, {}
    same = groups_of(loaded)
    for module, by_agent in loaded.lora.items():
        used = [by_agent[name].rank if name in by_agent else 0 for name in agents]
        ranks[module] = (*used, *(max(used) for _ in range(spare)))
        groups[module] = (*same[module], *range(len(agents), len(agents) + spare))
    return AgentSlots((*agents, *(f"{SPARE}{i + 1}" for i in range(spare))), ranks, groups)


def groups_of(loaded: LoadedModel) -> dict[str, tuple[int, ...]]:
    """Finds the agents that share an A.

    An adapted module keeps the groups that the model was fitted with; otherwise agents with a bit-equal A share it. A
    constant is one more column of `x A`, so agents share only if both or neither have one.

    Returns:
        Module FQN -> for each agent, index of the first agent with the same A, its own index if there is none.
    """
    agents = [agent.name for agent in loaded.agents]
    return {
        module: loaded.groups.get(module) or tuple(_first_equal(by_agent, agents, i) for i in range(len(agents)))
        for module, by_agent in loaded.lora.items()
    }


def assign(agent_slots: AgentSlots, names: Sequence[str]) -> AgentSlots:
    """Assigns agents to slots. An agent that has a slot keeps it; new agents take free slots in order.

    Args:
        names: all agents that get a slot; slots of other agents become spare.

    Raises:
        AdapterError: more agents than slots.
    """
    if len(names) > len(agent_slots.names):
        raise AdapterError(
            f"the artifact has slots for {len(agent_slots.names)} agents, not for {len(names)}",
            "Convert again, with --spare to keep slots free for later agents.",
        )
    new = [name for name in names if name not in agent_slots.names]
    taken = [name if name in names else new.pop(0) if new else "" for name in agent_slots.names]
    spare = (f"{SPARE}{i + 1}" for i in range(len(taken)))
    return dataclasses.replace(agent_slots, names=tuple(name or next(spare) for name in taken))


def fit(loaded: LoadedModel, agent_slots: AgentSlots) -> LoadedModel:
    """Returns the model with one agent per slot, in slot order. Weights are padded to the slots' ranks with zeros.

    Raises:
        AdapterError: an adapter does not fit its slot (the message names agent, module and both ranks), or no agent
            adapts a module of the program any more.
    """
    present = {agent.name: agent for agent in loaded.agents}
    for module, by_agent in loaded.lora.items():
        for name in by_agent:
            _require_fits(name, module, by_agent[name], agent_slots)
    lora: dict[str, dict[str, LoraWeights]] = {}
    for module, ranks in agent_slots.ranks.items():
        by_agent = loaded.lora.get(module, {})
        if not by_agent:
            raise AdapterError(f"no agent adapts {module} any more", "Convert again: the program changes.")
        shapes = next(iter(by_agent.values()))
        lora[module] = {}
        for name, rank in zip(agent_slots.names, ranks, strict=True):
            if rank:
                lora[module][name] = _filled(by_agent.get(name), shapes, rank)
        _share(lora[module], agent_slots, module, by_agent)
    agents = tuple(present.get(name) or Agent(name) for name in agent_slots.names)
    return dataclasses.replace(loaded, agents=agents, lora=lora, groups=agent_slots.groups)


def _first_equal(by_agent: Mapping[str, LoraWeights], agents: Sequence[str], index: int) -> int:
    this = by_agent.get(agents[index])
    for other in range(index if this is not None else 0):
        weights = by_agent.get(agents[other])
        if this is not None and weights is not None and _same_stream(this, weights):
            return other
    return index


def _same_stream(left: LoraWeights, right: LoraWeights) -> bool:
    constants = (left.constant is None) == (right.constant is None)
    return constants and left.a.shape == right.a.shape and torch.equal(left.a, right.a)


def _require_fits(name: str, module: str, weights: LoraWeights, agent_slots: AgentSlots) -> None:
    rank = agent_slots.ranks[module][agent_slots.names.index(name)] if module in agent_slots.ranks else 0
    if weights.rank > rank:
        raise rank_refusal(name, module, weights.rank, rank)


def rank_refusal(name: str, module: str, rank: int, slot_rank: int) -> AdapterError:
    """The error for an adapter with a larger rank on a module than its slot, which may not adapt it at all."""
    found = f"has rank {slot_rank}" if slot_rank else "does not adapt it"
    return AdapterError(
        f"adapter {name} has rank {rank} on {module}, its slot {found}",
        "Convert again: an update keeps the compiled program, and with it ranks and adapted modules.",
    )


def _filled(weights: LoraWeights | None, shapes: LoraWeights, rank: int) -> LoraWeights:
    if weights is None:
        a, b = shapes.a, shapes.b
        return LoraWeights(a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank), 1.0)
    return dataclasses.replace(weights, a=padded(weights.a, rank, 0), b=padded(weights.b, rank, 1))


def padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    """A tensor with zeros up to `rank` entries on an axis."""
    if tensor.shape[axis] == rank:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _share(
    lora: dict[str, LoraWeights], agent_slots: AgentSlots, module: str, by_agent: Mapping[str, LoraWeights]
) -> None:
    """Makes slots of one group share one A; a slot without adapter on the module gets the A of the others.

    Raises:
        AdapterError: two adapters of a group differ in their A.
    """
    for leader in set(agent_slots.groups[module]):
        members = [
            n
            for n, group in zip(agent_slots.names, agent_slots.groups[module], strict=True)
            if group == leader and n in lora
        ]
        present = [name for name in members if name in by_agent]
        for name in members if present else ():
            if name not in by_agent:
                lora[name] = dataclasses.replace(lora[name], a=lora[present[0]].a)
            elif not torch.equal(lora[name].a, lora[present[0]].a):
                raise AdapterError(
                    f"adapters {present[0]} and {name} differ in their A on {module}, which their slots share",
                    "Convert again: the sharing of A is part of the compiled program.",
                )
