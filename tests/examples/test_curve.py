"""The curve: its ends are the schemes that they are said to be, and what is measured is kept."""

from __future__ import annotations

import json

import pytest

from examples.fact_world.curve import Work, curve
from examples.fact_world.curve_points import REFRESH, RULES, AgentSums, Point, Sums
from examples.fact_world.curve_report import COLUMNS, CurveRow, Measured, curve_page, curve_rows, markdown
from lragent.runtime.schemes import SCHEMES
from tests.models import WrittenModel, write_model

TURNS = [["plan", None, 6, 20], ["action", None, 24, 40], ["plan", None, 40, 52], ["reflect", None, 55, 60]]


@pytest.fixture(scope="module")
def measured(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], CurveRow]:
    folder = tmp_path_factory.mktemp("curve")
    weaker = write_model(folder, "llama", b_std=0.05)
    sets = {"strong": tiny_llama.adapters["plan"].parent, "weak": weaker.adapters["plan"].parent}
    lines = [{"token_ids": [(k * i * i + 3 * i + 5) % 120 for i in range(60)], "generated": TURNS} for k in (7, 5)]
    trajectories = folder / "results.jsonl"
    trajectories.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    work = folder / "work.jsonl"

    def run() -> list[CurveRow]:
        return curve(tiny_llama.model_dir, sets, trajectories, Work(work), (0.5, 1.0), most=2, dtype="float32")[0]

    rows = run()
    whole = work.read_text()
    assert len(whole.splitlines()) == 2 * (2 * len(SCHEMES) + 2 * len(RULES))
    work.write_text(whole[:-40])  # killed while it wrote
    assert run() == rows
    assert len(work.read_text().splitlines()) == len(whole.splitlines())
    return {(row.adapters, row.sharing): row for row in rows}


def test_the_ends(measured: dict[tuple[str, str], CurveRow]) -> None:
    exact = measured["strong", "non_shared"]
    assert exact.kl == 0 and exact.top1 == 1 and exact.recovered_kl == exact.recovered_turns == 1
    recovered = [measured["strong", scheme].recovered_kl for scheme in SCHEMES]
    assert min(recovered) == 0 and all(0 <= value <= 1 for value in recovered)
    assert exact.to_non_shared == 1 and measured["strong", "full_shared"].to_full == 1
    assert measured["strong", "base_lr_shared"].to_full == 1
    everything = measured["strong", "100% recomputed, recent"]
    assert everything.kl < 1e-6 and everything.to_non_shared == 1


def test_half_is_between_in_cost_and_the_rule_that_looks_costs_more(
    measured: dict[tuple[str, str], CurveRow],
) -> None:
    recent, deviation = (measured["strong", f"50% recomputed, {rule}"] for rule in ("recent", "deviation"))
    none, everything = measured["strong", "base_lr_shared"], measured["strong", "100% recomputed, recent"]
    assert none.to_full < recent.to_full < deviation.to_full < everything.to_full
    assert none.bytes_per_token < recent.bytes_per_token == deviation.bytes_per_token < everything.bytes_per_token
    assert recent.kl > 1e-3 and deviation.kl > 1e-3


def test_another_set_is_compared_with_the_first(measured: dict[tuple[str, str], CurveRow]) -> None:
    assert measured["weak", "non_shared"].kl > 0.01
    assert not any(adapters == "weak" and "recomputed" in sharing for adapters, sharing in measured)


def test_the_gap_and_the_tables() -> None:
    def one(sharing: str, kl: float, right: int) -> Measured:
        sums = Sums(30.0, 0, 0, {"plan": AgentSums(10, kl, 9, 4, right), "action": AgentSums(10, 0.0, 10, 4, 4)})
        return Measured("set", Point(sharing, "recent" if sharing == REFRESH else "", 0.25), sums, 100.0)

    given = [one(name, 2.0 + number, 1) for number, name in enumerate(SCHEMES) if name != "non_shared"]
    rows = curve_rows(
        [one("non_shared", 0.0, 4), *given, one(REFRESH, 1.75, 3)], {"full_shared": 20, "non_shared": 60}, "set"
    )
    assert rows[-1].sharing == "25% recomputed, recent"
    assert rows[-1].recovered_kl == pytest.approx(0.75) and rows[-1].recovered_turns == pytest.approx(2 / 3)
    assert (rows[-1].worst_agent, rows[-1].worst_kl, rows[-1].kl) == ("plan", 0.175, pytest.approx(0.0875))
    assert (rows[-1].to_full, rows[-1].to_non_shared) == (1.5, 0.5)
    assert markdown(rows).splitlines()[0].count("|") == len(COLUMNS) + 1
    assert "25% recomputed, recent" in curve_page(rows, "note")
