"""A finished trajectory as training reads it: token ids and the turns that agents took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lragent.errors import RequestError
from lragent.program.agent import BASE


@dataclass(frozen=True)
class Turn:
    """Tokens `[start, end)` that one agent generated."""

    agent: str
    start: int
    end: int


@dataclass(frozen=True)
class TurnSequence:
    """Token ids of a trajectory and its turns in order. Tokens outside turns were appended."""

    token_ids: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class ActingTurn:
    """A turn and the tokens that its agent processes.

    An agent processes what was appended, and the last token of the turn before, when its own turn begins; the last
    token that it generates is left to the next turn.

    Args:
        agent: agent id, 0 for `base`.
        processed: the agent's forward runs tokens `[processed, turn.end - 1)`.
    """

    agent: int
    turn: Turn
    processed: int

    @property
    def end(self) -> int:
        return self.turn.end - 1

    @property
    def wanted(self) -> range:
        """Positions whose logits predict the generated tokens."""
        return range(self.turn.start - 1, self.end)


def acting_turns(sequence: TurnSequence, agents: tuple[str, ...]) -> Iterator[ActingTurn]:
    """The turns of a sequence with agent ids (index in `agents` + 1).

    Raises:
        RequestError: a turn is empty, overlaps another, has no token before it, or names an unknown agent.
    """
    processed, last = 0, 0
    for turn in sequence.turns:
        if turn.agent != BASE and turn.agent not in agents:
            known = ", ".join((*agents, BASE))
            raise RequestError(f"a turn names the agent {turn.agent!r}", f"The model has the agents {known}.")
        if not max(last, 1) <= turn.start < turn.end <= len(sequence.token_ids):
            raise RequestError(
                f"the turn of {turn.agent} has tokens [{turn.start}, {turn.end}) of {len(sequence.token_ids)}; "
                f"the turn before it ends at {last}",
                "Turns are in order, not empty, and have at least one token before them.",
            )
        yield ActingTurn(0 if turn.agent == BASE else agents.index(turn.agent) + 1, turn, processed)
        processed, last = turn.end - 1, turn.end
