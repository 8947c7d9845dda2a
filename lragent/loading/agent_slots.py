"""Places for agents in a program: what an adapter may be replaced with while the program stays as it is compiled.

A slot has a rank on each adapted module and, there, columns of its own or in common with other slots (one A). An
adapter fits a slot if it adapts no other modules, has no larger rank anywhere, and shares A where the slot does; it is
filled up with zeros. A slot without adapter is spare: nobody acts in it.
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

SPARE = "~"  # first letter of a spare slot's name; agents' names have none


@dataclass(frozen=True)
class AgentSlots:
    """Args:
    names: agent of each slot, in order; `~1`, `~2`, ... for spare ones.
    ranks: module -> rank of each slot, 0 where it does not adapt the module.
    groups: module -> for each slot, the first slot whose A it has (itself if none).
    """

    names: tuple[str, ...]
    ranks: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, tuple[int, ...]]


def agent_slots_of(loaded: LoadedModel, spare: int) -> AgentSlots:
    """One slot an agent, and spare ones that take any of their ranks."""
    agents = [agent.name for agent in loaded.agents]
    ranks, groups = {}, {}
    for module, by_agent in loaded.lora.items():
        own = [by_agent[name].rank if name in by_agent else 0 for name in agents]
        ranks[module] = (*own, *(max(own) for _ in range(spare)))
        same = loaded.groups.get(module) or [_first_equal(by_agent, agents, i) for i in range(len(agents))]
        groups[module] = (*same, *range(len(agents), len(agents) + spare))
    return AgentSlots((*agents, *(f"{SPARE}{i + 1}" for i in range(spare))), ranks, groups)


def assign(slots: AgentSlots, names: Sequence[str]) -> AgentSlots:
    """The slots with new occupants: an agent that has a slot keeps it, others take free ones in order.

    Raises:
        AdapterError: more agents than slots.
    """
    if len(names) > len(slots.names):
        raise AdapterError(
            f"the artifact has slots for {len(slots.names)} agents, not for {len(names)}",
            "Convert anew, with --spare to keep slots free for later agents.",
        )
    new = [name for name in names if name not in slots.names]
    taken = [name if name in names else new.pop(0) if new else "" for name in slots.names]
    spare = (f"{SPARE}{i + 1}" for i in range(len(taken)))
    return dataclasses.replace(slots, names=tuple(name or next(spare) for name in taken))


def fit(loaded: LoadedModel, slots: AgentSlots) -> LoadedModel:
    """The model with its agents in slots: in their order, filled up to their ranks, spare ones with zeros.

    Raises:
        AdapterError: an adapter that does not fit its slot; names agent, module and both sizes.
    """
    present = {agent.name: agent for agent in loaded.agents}
    for module, by_agent in loaded.lora.items():
        for name in by_agent:
            _require_fits(name, module, by_agent[name], slots)
    lora: dict[str, dict[str, LoraWeights]] = {}
    for module, ranks in slots.ranks.items():
        by_agent = loaded.lora.get(module, {})
        if not by_agent:
            raise AdapterError(f"no agent adapts {module} any more", "Convert anew: the program changes with it.")
        shapes = next(iter(by_agent.values()))
        lora[module] = {}
        for name, rank in zip(slots.names, ranks, strict=True):
            if rank:
                lora[module][name] = _filled(by_agent.get(name), shapes, rank)
        _share(lora[module], slots, module, by_agent)
    agents = tuple(present.get(name) or Agent(name) for name in slots.names)
    return dataclasses.replace(loaded, agents=agents, lora=lora, groups=slots.groups)


def _first_equal(by_agent: Mapping[str, LoraWeights], agents: Sequence[str], index: int) -> int:
    own = by_agent.get(agents[index])
    for other in range(index if own is not None else 0):
        weights = by_agent.get(agents[other])
        if own is not None and weights is not None and _same_columns(own, weights):
            return other
    return index


def _same_columns(left: LoraWeights, right: LoraWeights) -> bool:
    constants = (left.constant is None) == (right.constant is None)
    return constants and left.a.shape == right.a.shape and torch.equal(left.a, right.a)


def _require_fits(name: str, module: str, weights: LoraWeights, slots: AgentSlots) -> None:
    rank = slots.ranks[module][slots.names.index(name)] if module in slots.ranks else 0
    if weights.rank > rank:
        found = f"has rank {rank} there" if rank else "does not adapt it"
        raise AdapterError(
            f"adapter {name} has rank {weights.rank} on {module}, its slot {found}",
            "Convert anew: an update keeps the compiled program, and with it ranks and adapted modules.",
        )


def _filled(weights: LoraWeights | None, shapes: LoraWeights, rank: int) -> LoraWeights:
    if weights is None:
        a, b = shapes.a, shapes.b
        return LoraWeights(a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank), 1.0)
    return dataclasses.replace(weights, a=_padded(weights.a, rank, 0), b=_padded(weights.b, rank, 1))


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    if tensor.shape[axis] == rank:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _share(lora: dict[str, LoraWeights], slots: AgentSlots, module: str, by_agent: Mapping[str, LoraWeights]) -> None:
    """Slots of one group must have one A; a slot without adapter takes the others'."""
    for leader in set(slots.groups[module]):
        members = [
            n for n, group in zip(slots.names, slots.groups[module], strict=True) if group == leader and n in lora
        ]
        present = [name for name in members if name in by_agent]
        for name in members if present else ():
            if name not in by_agent:
                lora[name] = dataclasses.replace(lora[name], a=lora[present[0]].a)
            elif not torch.equal(lora[name].a, lora[present[0]].a):
                raise AdapterError(
                    f"adapters {present[0]} and {name} differ in their A on {module}, which their slots share",
                    "Convert anew: shared columns are part of the compiled program.",
                )
