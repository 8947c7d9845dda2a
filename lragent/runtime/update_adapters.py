"""Puts new versions of adapters into agent slots of an engine.

A version lies in one slot. Its LR values lie in the slot's own block. A slot that has none may read the block of the
version before, if the scheme has a block per distinct A and the version's A is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lragent.errors import AdapterError, RequestError
from lragent.program.agent import BASE
from lragent.program.live_adapters import AdapterSlots, GivenAdapter, ReadAdapter
from lragent.program.program import Program
from lragent.runtime.loop import EngineLoop
from lragent.runtime.roster import Roster


class VersionInUse(RequestError):
    """Open trajectories use the present version of an adapter, and no slot is spare for the new one."""


@dataclass(frozen=True)
class Placement:
    """A new adapter, the slot that it takes, and the slot whose LR block it reads."""

    adapter: ReadAdapter
    slot: int
    block: int


def read_all(program: Program, roster: Roster, adapters: Mapping[str, GivenAdapter]) -> tuple[ReadAdapter, ...]:
    """Reads new adapters; nothing is changed.

    Raises:
        RequestError: an unknown agent, or a program without `adapters`.
        AdapterError: see `lragent.program.live_adapters.AdapterSlots.read`.
    """
    slots = _slots(program)
    for name in adapters:
        roster.require(name)
        if name == BASE:
            raise RequestError(f'"{BASE}" is the model without adapter', "Update the other agents.")
    return tuple(slots.read(roster.slots[roster.current[name]], given) for name, given in adapters.items())


def place(loop: EngineLoop, roster: Roster, adapters: Sequence[ReadAdapter]) -> dict[str, str]:
    """Puts adapters into slots; returns agent name -> digest.

    Raises:
        AdapterError: an adapter fits no slot.
        VersionInUse: it fits slots, but none is free.
    """
    slots = _slots(loop.program)
    placements = _plan(loop, roster, slots, adapters)
    slots.write({placed.slot: placed.adapter for placed in placements})
    for placed in placements:
        if placed.block != placed.slot:
            loop.memory.read_block(placed.slot, placed.block)
        if loop.scheme.own_lr_only:
            loop.cache.pool.forget_lr(placed.slot)
    tables = [item for state in loop.states for item in state.page_tables.items()]
    roster.put({placed.slot: (placed.adapter.agent, placed.block) for placed in placements}, tables)
    return {placed.adapter.agent.name: placed.adapter.agent.digest for placed in placements}


def updated(program: Program, roster: Roster) -> Program:
    """A program with its present agents, also in its identity."""
    if not roster.updates:
        return program
    digests = {name: roster.slots[slot].digest for name, slot in sorted(roster.current.items()) if name != BASE}
    identity = partial(_identity, program.identity, digests)
    return replace(program, agents=roster.agents(), identity=identity)


def _identity(made: Callable[[], Mapping[str, Any]], digests: Mapping[str, str]) -> dict[str, Any]:
    return {**made(), "updated adapters": dict(digests)}


def _slots(program: Program) -> AdapterSlots:
    if program.adapters is None:
        raise RequestError("the adapters of this program can't be changed in memory", "Convert the model again.")
    return program.adapters


def _plan(
    loop: EngineLoop, roster: Roster, slots: AdapterSlots, adapters: Sequence[ReadAdapter]
) -> Sequence[Placement]:
    updated = {adapter.agent.name for adapter in adapters}
    others = {slot for name, slot in roster.current.items() if name not in updated}
    others |= {roster.blocks[slot] for slot in others}
    placements, left = _assign(loop, roster, slots, adapters, others)
    if left is not None:  # no slot, even if all trajectories were closed
        raise _misfit(roster, slots, left, others, placements)
    placements, left = _assign(loop, roster, slots, adapters, others | roster.in_use(loop.states))
    if left is not None:
        raise _in_use(loop, left.agent.name, roster.current[left.agent.name])
    return placements


def _assign(
    loop: EngineLoop, roster: Roster, slots: AdapterSlots, adapters: Sequence[ReadAdapter], kept: Collection[int]
) -> tuple[list[Placement], ReadAdapter | None]:
    """Placements of adapters, and the first adapter for which there is none.

    Args:
        kept: slots whose adapters must stay.
    """
    placements: list[Placement] = []
    for adapter in adapters:
        found = next(_placements(loop, roster, slots, adapter, kept, placements), None)
        if found is None:
            return placements, adapter
        placements.append(found)
    return placements, None


def _placements(
    loop: EngineLoop,
    roster: Roster,
    slots: AdapterSlots,
    adapter: ReadAdapter,
    kept: Collection[int],
    placements: Sequence[Placement],
) -> Iterator[Placement]:
    """The free slots that an adapter fits, the best first: its own, then those without LR blocks.

    Args:
        kept: slots whose adapters must stay.
        placements: of the other adapters of the same update.
    """
    taken = {placed.slot: placed.adapter for placed in placements}
    read = {roster.blocks[slot] for slot in kept} | {placed.block for placed in placements}
    for slot in roster.usable(roster.current[adapter.agent.name]):
        if slot in kept or slot in taken or slots.refusal(slot, adapter, {*kept, *read}, taken) is not None:
            continue
        if slot in roster.held:
            if slot not in read or roster.slots[slot].a_digest == adapter.agent.a_digest:
                yield Placement(adapter, slot, slot)
            continue
        block = _block_before(loop, roster, adapter, slot)
        if block is not None and block not in taken:
            yield Placement(adapter, slot, block)


def _block_before(loop: EngineLoop, roster: Roster, adapter: ReadAdapter, slot: int) -> int | None:
    """The slot whose LR block the present version of an agent reads; None if the new one can't read it in `slot`."""
    present = roster.current[adapter.agent.name]
    block = roster.blocks[present]
    same_a = loop.scheme.lr_blocks == "distinct" and adapter.agent.a_digest == roster.slots[present].a_digest
    same_ranks = all(s.ranks[slot - 1] == s.ranks[block - 1] for s in loop.program.schema.low_rank)
    return block if same_a and same_ranks else None


def _misfit(
    roster: Roster, slots: AdapterSlots, adapter: ReadAdapter, kept: Collection[int], placements: Sequence[Placement]
) -> AdapterError:
    """The reason for which an adapter fits no slot: that of the first slot that is free."""
    taken = {placed.slot: placed.adapter for placed in placements}
    usable = [s for s in roster.usable(roster.current[adapter.agent.name]) if s not in kept and s not in taken]
    errors = (slots.refusal(slot, adapter, kept, taken) for slot in usable)
    found = next((error for error in errors if error is not None), None)
    name = adapter.agent.name
    return found or AdapterError(f"no slot takes the new adapter of {name}", "Convert again, with --spare.")


def _in_use(loop: EngineLoop, name: str, slot: int) -> VersionInUse:
    users = sum(slot in {version.slot for version in state.versions.values()} for state in loop.states)
    return VersionInUse(
        f"{users} open trajectories use the present adapter of {name}, and no slot is spare",
        "Close them, or await aupdate_adapters, which waits. Or convert with --spare N, and load with spare=N if A "
        "changes and the sharing scheme caches low-rank values.",
    )
