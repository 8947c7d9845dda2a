"""An agent of a program: a named adapter, or a spare agent slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Name of the model without adapter, agent id 0.
BASE = "base"


@dataclass(frozen=True)
class Agent:
    """A named adapter, or a spare agent slot.

    Args:
        name: the agent's name; `~1`, `~2`, ... for spare slots.
        digest: sha256 of the weights; "" for a spare slot.
        rank: largest rank of any module.
        scalings: distinct scalings of the modules, in increasing order.
        targets: FQNs of the adapted modules.
        stop_token_ids: ids that end its turns besides the model's own stop tokens.
        tuned_for: sharing scheme that its adapter was tuned for (`lragent tune`); "" if none is known.
        a_digest: sha256 of its A's on K and V projections; "" without any. Equal if all their `x A` are equal.
    """

    name: str
    digest: str = ""
    rank: int = 0
    scalings: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    tuned_for: str = ""
    a_digest: str = ""

    @property
    def spare(self) -> bool:
        """True for an agent slot without adapter; no agent can act in it."""
        return not self.digest


def tuned_scheme(agents: Iterable[Agent]) -> str:
    """The sharing scheme that all agents were tuned for; "" if there is none or they differ."""
    schemes = {agent.tuned_for for agent in agents}
    return schemes.pop() if len(schemes) == 1 else ""
