"""A and B of every agent as trainable parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lragent.loading.adapter_weights import LoraWeights
from lragent.passes.contract import Adapter
from lragent.passes.pipeline import adapter


class AdapterParameters(nn.Module):
    """A `[r, in]` and B `[out, r]` of each agent on each module, without scaling, in at least float32.

    Agents that share an A on a module share one parameter.

    Args:
        lora: module FQN -> agent name -> weights.
        agents: names in order.
        groups: module FQN -> for each agent, index of the first agent with the same A (`agent_slots.groups_of`).
    """

    def __init__(
        self,
        lora: Mapping[str, Mapping[str, LoraWeights]],
        agents: tuple[str, ...],
        groups: Mapping[str, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self._lora = lora
        self._names: dict[str, dict[str, tuple[str, str]]] = {}  # module -> agent -> names of A and B
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for number, (module, by_agent) in enumerate(lora.items()):
            for index, agent in enumerate(agents):
                if agent not in by_agent:
                    continue
                names = f"{number}_{groups[module][index]}", f"{number}_{index}"
                self._names.setdefault(module, {})[agent] = names
                weights = by_agent[agent]
                if names[0] not in self.a:
                    self.a[names[0]] = _master(weights.a)
                self.b[names[1]] = _master(weights.b)

    @property
    def pairs(self) -> dict[str, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
        """Module FQN -> agent -> A and B."""
        return {
            module: {agent: (self.a[a], self.b[b]) for agent, (a, b) in by_agent.items()}
            for module, by_agent in self._names.items()
        }

    def of_agent(self, agent: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Module FQN -> A and B of an agent, detached copies."""
        return {
            module: (by_agent[agent][0].detach().clone(), by_agent[agent][1].detach().clone())
            for module, by_agent in self.pairs.items()
            if agent in by_agent
        }

    def adapters(self, modules: Collection[str]) -> dict[str, dict[str, Adapter]]:
        """Module FQN -> agent -> weights in the dtype of the model, as `passes.adapters.constants` takes them."""
        return {
            module: {agent: _adapter(self._lora[module][agent], *pair) for agent, pair in by_agent.items()}
            for module, by_agent in self.pairs.items()
            if module in modules
        }


def _master(tensor: Tensor) -> nn.Parameter:
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    return nn.Parameter(wide)


def _adapter(weights: LoraWeights, a: Tensor, b: Tensor) -> Adapter:
    """Casts A and B before scaling, as a conversion does."""
    dtype = weights.a.dtype
    return adapter(dataclasses.replace(weights, a=a.to(dtype), b=b.to(dtype)))
