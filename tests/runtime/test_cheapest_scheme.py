"""The order of schemes by cost, and the cheapest one that drifts little."""

from __future__ import annotations

from lragent.program.drift import SchemeDrift, Tally
from lragent.runtime.cheapest_scheme import by_cost, cheapest_within
from lragent.runtime.schemes import SCHEMES

SIZES = {
    "non_shared": (100, 200, 300),
    "full_shared": (100, 100, 100),
    "base_shared": (110, 120, 130),
    "base_lr_shared": (110, 110, 110),
    "rebase_shared": (130, 130, 130),
}


def measured(scheme: str, **kl: float) -> SchemeDrift:
    """Ten tokens of each agent."""
    by_agent = {agent: Tally(10, 10 * value, 9) for agent, value in kl.items()}
    total = Tally(10 * len(kl), 10 * sum(kl.values()), 9 * len(kl))
    return SchemeDrift(scheme, total, by_agent, {}, {})


def test_bytes_decide_and_then_tokens_to_compute() -> None:
    assert by_cost(SIZES) == ["full_shared", "base_lr_shared", "rebase_shared", "base_shared", "non_shared"]
    assert set(by_cost(dict.fromkeys(SCHEMES, (1,)))) == set(SCHEMES)


def test_the_cheapest_scheme_under_which_no_agent_drifts_far() -> None:
    found = [
        measured("full_shared", plan=0.01, action=0.3),  # the mean of 0.155 hides nothing here
        measured("rebase_shared", plan=0.01, action=0.01),
        measured("base_lr_shared", plan=0.05, action=0.02),
    ]

    def chosen(max_kl: float, *agents: str) -> str | None:
        drift = cheapest_within(found, SIZES, max_kl, agents)
        return drift and drift.scheme

    assert chosen(0.05, "plan", "action") == "base_lr_shared"
    assert chosen(0.3, "plan", "action") == "full_shared"
    assert chosen(0.04, "plan", "action") == "rebase_shared"
    assert chosen(0.001, "plan", "action") is None
    assert chosen(0.05, "plan", "action", "reflect") is None  # nothing is known of reflect


def test_one_agent_with_few_tokens_is_not_hidden_by_a_mean() -> None:
    drift = SchemeDrift(
        "full_shared", Tally(1000, 11.0, 990), {"plan": Tally(990, 1.0, 990), "reflect": Tally(10, 10.0, 0)}, {}, {}
    )
    assert drift.total.mean_kl < 0.05 and drift.worst() == ("reflect", 1.0)
    assert cheapest_within([drift], SIZES, 0.05, ["plan", "reflect"]) is None


def test_a_scheme_that_can_not_run_is_not_chosen() -> None:
    sizes = {name: SIZES[name] for name in ("non_shared", "full_shared")}
    assert cheapest_within([measured("base_lr_shared", plan=0.0)], sizes, 0.05, ["plan"]) is None
