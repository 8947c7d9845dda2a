"""Measured drift: the distance of a sharing scheme's next-token distributions from those of `non_shared`.

`lragent.training.drift` measures it, artifacts keep it, and the choice of a scheme reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tally:
    """Sums over generated tokens.

    Args:
        tokens: number of tokens.
        kl: sum of KL(non_shared || scheme) over the vocabulary, in nats.
        same: number of tokens at which both distributions have the same most likely token.
    """

    tokens: int = 0
    kl: float = 0.0
    same: int = 0

    @property
    def mean_kl(self) -> float:
        """Nats per token; 0 without tokens."""
        return max(0.0, self.kl / self.tokens) if self.tokens else 0.0

    @property
    def agreement(self) -> float:
        """Share of tokens with the same most likely token; 1 without tokens."""
        return self.same / self.tokens if self.tokens else 1.0

    def plus(self, other: Tally) -> Tally:
        return Tally(self.tokens + other.tokens, self.kl + other.kl, self.same + other.same)

    def to_dict(self) -> dict[str, float]:
        return {"tokens": self.tokens, "kl": self.mean_kl, "top1": self.agreement}


@dataclass(frozen=True)
class SchemeDrift:
    """Drift of one scheme.

    Args:
        by_agent: by name of the agent that generated the token.
        by_distance: by number of tokens since another agent's last turn ended (`lragent.training.drift`).
        by_context: by number of tokens before the token.
    """

    scheme: str
    total: Tally
    by_agent: Mapping[str, Tally]
    by_distance: Mapping[str, Tally]
    by_context: Mapping[str, Tally]

    def worst(self) -> tuple[str, float]:
        """The agent with the largest mean KL, and that KL. A mean over all tokens can hide a role with few tokens."""
        name = max(self.by_agent, key=lambda agent: self.by_agent[agent].mean_kl)
        return name, self.by_agent[name].mean_kl

    def covers(self, agents: Collection[str]) -> bool:
        """True if every agent has measured tokens."""
        return all(agent in self.by_agent for agent in agents)

    def plus(self, other: SchemeDrift) -> SchemeDrift:
        return SchemeDrift(
            self.scheme,
            self.total.plus(other.total),
            _sum(self.by_agent, other.by_agent),
            _sum(self.by_distance, other.by_distance),
            _sum(self.by_context, other.by_context),
        )

    def to_dict(self) -> dict[str, Any]:
        """Means with counts, as reports show them."""
        agent, kl = self.worst()
        groups = {"by_agent": self.by_agent, "by_distance": self.by_distance, "by_context": self.by_context}
        return {
            "scheme": self.scheme,
            **self.total.to_dict(),
            "worst_agent": agent,
            "worst_kl": kl,
            **{name: {key: tally.to_dict() for key, tally in group.items()} for name, group in groups.items()},
        }


def _sum(left: Mapping[str, Tally], right: Mapping[str, Tally]) -> dict[str, Tally]:
    """Groups of both; the order of bins stays that of the first mapping that has them."""
    return {name: left.get(name, Tally()).plus(right.get(name, Tally())) for name in {**left, **right}}
