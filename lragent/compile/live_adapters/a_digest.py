"""Digests of the A's that an agent's cached low-rank values depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

from lragent.loading.adapter_weights import LoraWeights, add_tensors
from lragent.program.adapter_map import AdapterMap
from lragent.program.agent import Agent


def a_digest(lora: Mapping[str, LoraWeights], adapter_map: AdapterMap) -> str:
    """sha256 of an adapter's A's on K and V projections, as if without rows of zeros at their ends; "" if none is left.

    Args:
        lora: module FQN -> weights.
    """
    sha = hashlib.sha256()
    empty = True
    for module in sorted({module for constant in adapter_map.attention for module in constant.modules}):
        if module not in lora:
            continue
        used = lora[module].a.any(1).nonzero()
        if len(used):
            empty = False
            add_tensors(sha, module, (lora[module].a[: int(used.max()) + 1],))
    return "" if empty else sha.hexdigest()


def with_a_digests(
    agents: Iterable[Agent], lora: Mapping[str, Mapping[str, LoraWeights]], adapter_map: AdapterMap | None
) -> tuple[Agent, ...]:
    """Agents with the digests of their A's.

    Args:
        lora: module FQN -> agent name -> weights.
        adapter_map: of the program in split layout; None: there is none.
    """
    if adapter_map is None:
        return tuple(agents)
    return tuple(
        agent
        if agent.spare
        else dataclasses.replace(
            agent,
            a_digest=a_digest(
                {m: by_agent[agent.name] for m, by_agent in lora.items() if agent.name in by_agent}, adapter_map
            ),
        )
        for agent in agents
    )
