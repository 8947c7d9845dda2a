"""The order of sharing schemes by cost, and the cheapest one whose measured drift is small."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lragent.errors import RequestError
from lragent.program.drift import SchemeDrift

# Schemes of equal size by tokens to compute, fewest first: nothing again; a second row for each generated token; the
# turn's tokens again; every token again for each agent.
_COMPUTE = ("full_shared", "base_lr_shared", "neutral_shared", "rebase_shared", "base_shared", "non_shared")


def by_cost(sizes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Schemes by bytes of cache of a token that all agents have seen, then by tokens to compute; cheapest first.

    Args:
        sizes: result of `lragent.runtime.cache_cost.bytes_per_token`.
    """
    return sorted(sizes, key=lambda name: (sizes[name][-1], _COMPUTE.index(name)))


def require_max_kl(max_kl: float) -> None:
    """Raises RequestError unless the limit is above 0."""
    if not max_kl > 0:
        raise RequestError(f"max_kl is {max_kl}, must be above 0")


def cheapest_within(
    found: Iterable[SchemeDrift], sizes: Mapping[str, tuple[int, ...]], max_kl: float, agents: Collection[str]
) -> SchemeDrift | None:
    """The cheapest scheme under which no agent drifts by more than `max_kl`; None: no scheme.

    Args:
        found: measured schemes. One that has no tokens of some agent in `agents` doesn't count.
        sizes: see `by_cost`; schemes that are not in it can't run.
        max_kl: nats per token.
    """
    measured = {drift.scheme: drift for drift in found}
    for name in by_cost(sizes):
        drift = measured.get(name)
        if drift is not None and drift.covers(agents) and drift.worst()[1] <= max_kl:
            return drift
    return None
