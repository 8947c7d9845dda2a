"""A trajectory as a result holds it: tokens, the agents that generated them, the agents that computed their K/V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class AgentSpan(NamedTuple):
    """Positions `[start, end)` of one agent.

    Args:
        adapter: digest of the agent's adapter weights (`lragent.program.agent.Agent`); "" for `base`.
    """

    agent: str
    adapter: str
    start: int
    end: int


@dataclass(frozen=True)
class TrajectoryRecord:
    """One trajectory at the end of its task. Lists without another note have an entry per token.

    Args:
        generated: spans of sampled (or forced) tokens, in order; a span is a turn.
        written: spans of tokens whose K/V are, or were, in the cache, each with the agent whose forward wrote them: the
            cache's write log. Tokens that no agent has processed have no span. Under `non_shared` every agent has a
            cache of its own, and the spans of one agent follow those of another.
        logprobs: log-probability under the unfiltered distribution; None for appended tokens.
        sampled_logprobs: log-probability under the distribution that the token was drawn from, after temperature and
            filters; None for appended and forced tokens.
        kept_mass: probability at the turn's temperature of the tokens that filters kept; None as above.
        seeds, finish_reasons, stop_reasons: one per generated span; a span that `Trajectory.truncate` has cut has the
            finish reason "truncated".
    """

    token_ids: list[int]
    generated: list[AgentSpan]
    written: list[AgentSpan]
    logprobs: list[float | None]
    sampled_logprobs: list[float | None]
    kept_mass: list[float | None]
    seeds: list[int]
    finish_reasons: list[str]
    stop_reasons: list[str | int | None]
