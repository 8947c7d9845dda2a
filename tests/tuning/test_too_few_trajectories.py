"""The sentence on trajectories that were learned by heart."""

from __future__ import annotations

from lragent.tuning.measure import Agreement
from lragent.tuning.report import RoundReport, too_few_trajectories


def report(held_out: float, loss: float, kept_step: int = 8) -> RoundReport:
    losses = tuple((step, loss if step >= 6 else 1.0) for step in range(8))
    return RoundReport(8, 8, kept_step, "", 1.0, losses, ((0, 1.0), (4, 0.5), (8, held_out)))


def figures(kl: float) -> dict[str, Agreement]:
    return {name: Agreement(10, 2, value, 1.0, 0.1, 1.0) for name, value in (("plan", 0.001), ("check", kl))}


def test_an_agent_apart_on_held_out_trajectories_alone_needs_more_of_them() -> None:
    sentence = too_few_trajectories(report(held_out=0.02, loss=0.004), figures(0.05))
    assert "check is still 0.050" in sentence and "5.0 times" in sentence


def test_nothing_is_said_of_agents_that_are_near_or_as_far_in_the_last_steps() -> None:
    assert too_few_trajectories(report(held_out=0.02, loss=0.004), figures(0.01)) == ""
    assert too_few_trajectories(report(held_out=0.02, loss=0.015), figures(0.05)) == ""
    assert too_few_trajectories(report(held_out=0.02, loss=0.004, kept_step=0), figures(0.05)) == ""
