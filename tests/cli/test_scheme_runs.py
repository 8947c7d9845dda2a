import asyncio
from types import SimpleNamespace
from typing import Any

from lragent_cli.scheme_runs import SchemeRun, SwitchTimes, comparison_table
from tests.cli.conftest import text_of


class SlowTrajectory:
    """Turn number i takes 2**i seconds to its first token; remembers what was appended."""

    def __init__(self) -> None:
        self.turns = 0
        self.appended: list[str] = []

    def append(self, text: str, parse_special: bool = True) -> None:
        self.appended.append(text)

    async def agenerate(self, agent: str, **options: Any) -> Any:
        self.turns += 1
        return SimpleNamespace(agent=agent, options=options, usage=SimpleNamespace(ttft=2.0 ** (self.turns - 1)))


def test_only_turns_after_another_agent_count_as_switches() -> None:
    async def workflow(task: dict[str, Any], t: Any) -> dict[str, Any]:
        t.append("a question")
        for agent in ("plan", "plan", "action", "plan", "plan"):
            turn = await t.agenerate(agent, max_new_tokens=3)
            assert turn.options == {"max_new_tokens": 3}
        return {"turns": t.turns}

    times, trajectory = SwitchTimes(), SlowTrajectory()
    watched = times.watch(workflow)
    assert asyncio.run(watched({}, trajectory)) == {"turns": 5}  # type: ignore[arg-type]
    assert trajectory.appended == ["a question"]
    assert times.seconds == 4 + 8


def run(sharing: str, **changes: Any) -> SchemeRun:
    figures: dict[str, Any] = dict.fromkeys(SchemeRun.__dataclass_fields__, 0) | {"adapters": ""}
    return SchemeRun(**figures | {"sharing": sharing, "exact_match": None, "seconds": 2.0} | changes)


def test_rows_without_anything_to_say_are_left_out() -> None:
    shown = text_of(comparison_table([run("non_shared", generated=9), run("full_shared")], "title"))
    assert "4.5" in shown and "computed: adapter-free" in shown
    for absent in ("exact match", "tasks failed", "computed: again"):
        assert absent not in shown


def test_rows_appear_when_one_scheme_has_something_to_say() -> None:
    runs = [run("non_shared", exact_match=0.875, replay=3, rerun=4), run("full_shared", failed=2)]
    shown = text_of(comparison_table(runs, "title"))
    for present in ("87.5%", "tasks failed", "computed: again", "7"):
        assert present in shown


def test_the_head_of_a_column_names_the_adapters_where_sets_are_compared() -> None:
    shown = text_of(
        comparison_table([run("full_shared", adapters="as shipped"), run("full_shared", adapters="tuned")], "")
    )
    assert "as shipped" in shown and "tuned" in shown
