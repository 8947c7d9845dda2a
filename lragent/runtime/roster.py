"""The agents of an engine: the adapter in every agent slot, and the slot of every agent.

A new version of an agent's adapter lies in the agent's own slot or, while open trajectories use the version before, in
another one. A trajectory keeps the version of an agent that it used first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lragent.errors import RequestError
from lragent.program.agent import BASE, Agent
from lragent.runtime.cache.key_rules import key_rules
from lragent.runtime.cache.page_table import PageTable
from lragent.runtime.cache.prefix_index import KeyRules
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.schemes import Scheme
from lragent.runtime.trajectory_state import TrajectoryState, Version


@dataclass(eq=False)
class Roster:
    """Slots are named by agent ids: 0 is `base`, slot i > 0 is that of agent i of the program.

    Args:
        slots: by agent id, the agent whose adapter lies in the slot; a spare slot has an agent without digest.
        acting: names of agents that may act, `base` first.
        held: slots with an LR block of their own in the cache, or all slots where the layout has no LR blocks.
        current: agent name -> slot of its newest version.
        blocks: by agent id, the slot whose LR block the agent reads: its own if it is held.
        rules: key rules by owner of page tables: by agent id in `non_shared`, else one under key 0.
        updates: number of updates.
    """

    scheme: Scheme
    slots: list[Agent]
    acting: tuple[str, ...]
    held: frozenset[int]
    current: dict[str, int]
    updates: int = 0

    def __post_init__(self) -> None:
        self.blocks = list(range(len(self.slots)))
        self._usable = [
            slot for slot, agent in enumerate(self.slots) if slot and (agent.spare or agent.name in self.acting)
        ]
        self.rules = self._key_rules()

    @classmethod
    def of(cls, agents: Iterable[Agent], scheme: Scheme, acting: tuple[str, ...], held: frozenset[int]) -> Roster:
        """The roster of an engine that was just made.

        Args:
            agents: the program's agents, spare ones too.
            acting: names of agents that may act besides `base`.
        """
        slots = [Agent(BASE), *agents]
        current = {agent.name: slot for slot, agent in enumerate(slots) if agent.name in (BASE, *acting)}
        return cls(scheme, slots, (BASE, *acting), held, current)

    def version(self, state: TrajectoryState, agent: str) -> Version:
        """The version with which an agent acts on a trajectory, which keeps it from now on.

        Raises:
            RequestError: the agent is unknown or may not act.
        """
        self.require(agent)
        if agent not in state.versions:
            slot = self.current[agent]
            state.versions[agent] = Version(agent, slot, self.slots[slot].digest)
        return state.versions[agent]

    def require(self, agent: str) -> None:
        """Raises RequestError for an agent that is unknown or may not act."""
        if agent not in self.current:
            raise RequestError(f"unknown agent {agent!r}", f"Agents are: {', '.join(self.acting)}.")

    def table(self, state: TrajectoryState, slot: int | None, cache: SharedCache) -> PageTable:
        """The page table on which a version works. If its pages lack columns of the version's A, it loses them all.

        Args:
            slot: None for an adapter-free forward.
        """
        owner = slot if self.scheme.page_table_per_agent and slot is not None else 0
        rules = self.rules[owner]
        table = state.table_for(owner, len(self.slots), rules)
        lacks = slot is not None and table.rules.columns_of(self.blocks[slot]) != rules.columns_of(self.blocks[slot])
        if lacks or not table.computed:
            table.drop(cache)
            table.take_rules(rules)
        return table

    def in_use(self, states: Iterable[TrajectoryState]) -> set[int]:
        """Slots whose versions open trajectories keep."""
        return {version.slot for state in states for version in state.versions.values()}

    def usable(self, present: int) -> list[int]:
        """Slots that a new version may take: the agent's present slot first, then those without an LR block."""
        return sorted(self._usable, key=lambda slot: (slot != present, slot in self.held, slot))

    def put(self, placed: Mapping[int, tuple[Agent, int]], tables: Iterable[tuple[int, PageTable]]) -> None:
        """Notes new versions of agents.

        Pages of open trajectories lack the columns of every new A. Their keys say so from now on, and match no others.

        Args:
            placed: slot -> the agent with the adapter that now lies in it, and the slot whose LR block it reads.
            tables: page tables of open trajectories, with their owners.
        """
        self.updates += 1
        changed: set[int] = set()
        for slot, (agent, block) in placed.items():
            if slot in self.held and self.slots[slot].a_digest != agent.a_digest:
                changed.add(slot)
            self.slots[slot] = agent
            self.blocks[slot] = block
            self.current[agent.name] = slot
        self.rules = self._key_rules()
        mixed = b"mixed by update %d" % self.updates
        for owner, table in tables:
            columns = (mixed if slot in changed else own for slot, own in enumerate(table.rules.columns))
            table.take_rules(replace(self.rules[owner], columns=tuple(columns)))
            for slot in placed:
                table.lr_covered_before[slot] = 0

    def agents(self) -> tuple[Agent, ...]:
        """The newest versions, by slot; other slots are spare."""
        return tuple(
            agent if agent.spare or self.current.get(agent.name, slot) == slot else Agent(f"~old{slot}")
            for slot, agent in enumerate(self.slots)
            if slot > 0
        )

    def _key_rules(self) -> tuple[KeyRules, ...]:
        columns = [agent.a_digest if slot in self.held else "" for slot, agent in enumerate(self.slots)]
        return key_rules(self.scheme, [agent.digest for agent in self.slots], columns)
