"""The agent slots of a program in memory: other adapters are written into its constants, where programs read them.

Legend: R = rank of a slot on a module, r = rank of a K or V of a slot, over all its projections.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.compile.live_adapters.a_digest import a_digest
from lragent.compile.live_adapters.read import CONVERT, read_lora
from lragent.errors import AdapterError
from lragent.loading.adapter_weights import digest
from lragent.loading.agent_slots import padded, rank_refusal
from lragent.passes.adapters.constants import attention_b
from lragent.passes.contract import Adapter
from lragent.passes.pipeline import adapter as in_graph
from lragent.program.adapter_map import AdapterMap, RoutedConstants
from lragent.program.agent import Agent
from lragent.program.live_adapters import GivenAdapter, ReadAdapter


@dataclass(frozen=True)
class ConstantSlots:
    """See `lragent.program.live_adapters.AdapterSlots`.

    Args:
        agents: the agents that the program was made with, by slot.
        adapter_map: the constants that follow from A and B.
        constants: the tensors that the program reads, by name. They are written in place; no file may share their
            memory.
        dtype: of the program's weights.
    """

    agents: tuple[Agent, ...]
    adapter_map: AdapterMap
    constants: Mapping[str, Tensor]
    dtype: torch.dtype

    def read(self, present: Agent, given: GivenAdapter) -> ReadAdapter:
        """Reads an adapter and checks it against the program's modules."""
        modules = self._modules()
        lora = read_lora(present, given, modules, self.dtype)
        for module, weights in lora.items():
            inputs, outputs = self._inputs(modules[module]), modules[module].outputs
            shapes = [list(weights.a.shape), list(weights.b.shape)]
            if shapes != [[weights.a.shape[0], inputs], [outputs, weights.a.shape[0]]]:
                raise AdapterError(
                    f"adapter {present.name}: A and B of {module} have shapes {shapes[0]} and {shapes[1]}, the module "
                    f"has {inputs} inputs and {outputs} outputs",
                    "A is [r, inputs], B is [outputs, r].",
                )
        agent = Agent(
            name=present.name,
            digest=digest(lora, {}),
            rank=max(weights.rank for weights in lora.values()),
            scalings=tuple(sorted({weights.scaling for weights in lora.values()})),
            targets=tuple(lora),
            stop_token_ids=present.stop_token_ids,
            a_digest=a_digest(lora, self.adapter_map),
        )
        stacked = {module: in_graph(weights) for module, weights in lora.items()}
        return ReadAdapter(agent, {module: (weights.a, weights.b) for module, weights in stacked.items()})

    def refusal(
        self, slot: int, adapter: ReadAdapter, live: Collection[int], others: Mapping[int, ReadAdapter]
    ) -> AdapterError | None:
        """The reason for which an adapter does not fit a slot; None if it fits."""
        name, modules = adapter.agent.name, self._modules()
        fixed = next((m for m in self.agents[slot - 1].targets if m in self.adapter_map.fixed), None)
        if fixed is not None:
            return AdapterError(f"the slot of {name} has DoRA magnitudes or replaced rows on {fixed}", CONVERT)
        for module, (a, _) in adapter.matrices.items():
            routed = modules[module]
            rank = routed.stream.ranks[slot - 1]
            if a.shape[0] > rank:
                return rank_refusal(name, module, a.shape[0], rank)
            ones = self.constants.get(routed.ones)
            if ones is not None and bool(ones[self._columns(routed, slot)].any()):
                return AdapterError(f"the slot of {name} has a trained bias on {module}", CONVERT)
            for other in self._sharers(routed, slot):
                if self._parted(routed, padded(a, rank, 0), other, live, others):
                    return AdapterError(
                        f"the new adapter of {name} has another A on {module} than {self.agents[other - 1].name}, with "
                        "whose slot its slot shares one",
                        "Convert again with separate A: the sharing of A is part of the compiled program.",
                    )
        return None

    def write(self, adapters: Mapping[int, ReadAdapter]) -> None:
        """Puts adapters into their slots, in place; all values are computed before the first one is written."""
        values = [pair for slot, adapter in adapters.items() for pair in self._values(slot, adapter)]
        with torch.no_grad():
            for target, value in values:
                target.copy_(value)

    def _values(self, slot: int, adapter: ReadAdapter) -> list[tuple[Tensor, Tensor]]:
        """Parts of constants that belong to a slot, and their new values.

        On a module that the adapter leaves out, B is zero, and A stays: another slot may share it.
        """
        found: list[tuple[Tensor, Tensor]] = []
        weights: dict[str, dict[str, Adapter]] = {}
        name = adapter.agent.name
        for routed in self.adapter_map.routed:
            module, rank = routed.stream.module, routed.stream.ranks[slot - 1]
            weights[module] = {}
            if not rank:
                continue
            a, b = adapter.matrices.get(module, (None, torch.zeros(routed.outputs, rank, dtype=self.dtype)))
            b_OR = padded(b, rank, 1)
            weights[module] = {name: Adapter(b_OR.new_zeros(rank, 0), b_OR)}
            if a is not None and routed.a in self.constants:
                found.append((self._rows_of_a(routed, slot), padded(a, rank, 0)))
            if routed.b in self.constants:
                start = sum(routed.stream.ranks[: slot - 1])
                found.append((self.constants[routed.b][start : start + rank], b_OR.T))
        for constant in self.adapter_map.attention:
            if any(weights[module] for module in constant.modules):
                value_HrD = attention_b(constant, (name,), weights)[1]
                found.append((self.constants[constant.name][slot, :, : value_HrD.shape[1]], value_HrD))
        return found

    def _modules(self) -> dict[str, RoutedConstants]:
        return {routed.stream.module: routed for routed in self.adapter_map.routed}

    def _inputs(self, routed: RoutedConstants) -> int:
        return self.constants[routed.a].shape[0 if routed.embeds else 1]

    @staticmethod
    def _columns(routed: RoutedConstants, slot: int) -> slice:
        """Columns of a slot in `x @ A_cat.T`."""
        start = routed.stream.source_columns()[slot - 1]
        return slice(start, start + routed.stream.ranks[slot - 1])

    def _rows_of_a(self, routed: RoutedConstants, slot: int) -> Tensor:
        """A of a slot, `[R, in]`, as a view of the constant."""
        a_cat = self.constants[routed.a]
        return (a_cat.T if routed.embeds else a_cat)[self._columns(routed, slot)]

    @staticmethod
    def _sharers(routed: RoutedConstants, slot: int) -> list[int]:
        """Other slots that share their A with a slot."""
        groups = routed.stream.shares_a_with
        return [other for other, group in enumerate(groups, 1) if group == groups[slot - 1] and other != slot]

    def _parted(
        self,
        routed: RoutedConstants,
        a: Tensor,
        other: int,
        live: Collection[int],
        others: Mapping[int, ReadAdapter],
    ) -> bool:
        """True if another slot, which shares its A, has or gets another one than `a` `[R, in]`."""
        if other in others:
            pair = others[other].matrices.get(routed.stream.module)
            return pair is not None and not torch.equal(padded(pair[0], a.shape[0], 0), a)
        return other in live and not torch.equal(self._rows_of_a(routed, other).cpu(), a)
