"""Plans of each scheme, as (kind, agent, start, end, writes base, whose columns)."""

import pytest

from lragent.errors import RequestError
from lragent.runtime.cache.write_log import WriteRange
from lragent.runtime.schemes import SCHEMES, View, scheme_named, spans_of_turn

Row = tuple[str, int, int, int, bool, set[int]]


def view(
    agent: int | None, tokens: int, runs: list[WriteRange], computed: int | None = None, **changes: object
) -> View:
    extent = runs[-1].end if runs else 0
    computed = extent if computed is None else computed
    fields: dict[str, object] = {
        "settled": computed,
        "settled_before": extent,
        "lr_covered": (0, 0, 0),
        "lr_covered_before": (0, 0, 0),
        "prompt": tokens,
        "turn_start": extent,
    }
    fields.update(changes)
    return View(log=tuple(runs), computed=computed, tokens=tokens, agent=agent, **fields)  # type: ignore[arg-type]


def rows(scheme: str, of: View) -> list[Row]:
    spans = spans_of_turn(SCHEMES[scheme], of, of.tokens - 1)
    return [
        (s.kind, s.agent, s.start, s.end, s.writes_base, {a for a, flag in enumerate(s.lr_writers) if flag})
        for s in spans
    ]


@pytest.mark.parametrize("scheme", ["non_shared", "full_shared", "base_lr_shared"])
def test_written_once(scheme: str) -> None:
    assert rows(scheme, view(2, 15, [WriteRange(1, 0, 10)])) == [("prefill", 2, 10, 15, True, {1, 2})]
    assert rows(scheme, view(2, 15, [WriteRange(1, 0, 10), WriteRange(0, 10, 12)], computed=8)) == [
        ("replay", 1, 8, 10, True, {1, 2}),
        ("replay", 0, 10, 12, True, {1, 2}),
        ("prefill", 2, 12, 15, True, {1, 2}),
    ]


def test_base_shared_catches_up_on_own_columns_only() -> None:
    of = view(2, 15, [WriteRange(1, 0, 10)], lr_covered=(0, 10, 4))
    assert rows("base_shared", of) == [("catch_up", 2, 4, 10, False, {2}), ("prefill", 2, 10, 15, True, {2})]


def test_base_shared_base_needs_no_catch_up_and_writes_no_columns() -> None:
    assert rows("base_shared", view(0, 15, [WriteRange(1, 0, 10)])) == [("prefill", 0, 10, 15, True, set())]


def test_base_shared_replay_catches_up_writer_by_writer() -> None:
    of = view(1, 22, [WriteRange(1, 0, 10), WriteRange(2, 10, 20)], computed=0, lr_covered_before=(0, 16, 20))
    assert rows("base_shared", of) == [
        ("replay", 1, 0, 10, True, {1}),
        ("replay", 2, 0, 10, False, {2}),
        ("replay", 2, 10, 20, True, {2}),
        ("replay", 1, 10, 16, False, {1}),
        ("catch_up", 1, 16, 20, False, {1}),
        ("prefill", 1, 20, 22, True, {1}),
    ]


def test_rebase_rewrites_the_turn_before_without_its_writers_columns() -> None:
    of = view(2, 15, [WriteRange(1, 0, 10)], settled=0, settled_before=0)
    assert rows("rebase_shared", of) == [("adapter_free", 0, 0, 10, True, {2}), ("prefill", 2, 10, 15, True, {1, 2})]


def test_rebase_needs_no_adapter_free_pass_after_base() -> None:
    assert rows("rebase_shared", view(2, 15, [WriteRange(0, 0, 10)])) == [("prefill", 2, 10, 15, True, {1, 2})]


def test_rebase_replays_turn_by_turn_but_not_the_adapter_free_pass_of_the_turn_in_progress() -> None:
    of = view(
        2, 15, [WriteRange(1, 0, 10), WriteRange(2, 10, 14)], computed=0, settled_before=6, prompt=12, turn_start=10
    )
    assert rows("rebase_shared", of) == [
        ("replay", 1, 0, 10, True, {1, 2}),
        ("replay", 0, 0, 6, True, {2}),
        ("adapter_free", 0, 6, 10, True, {2}),
        ("replay", 2, 10, 14, True, {1, 2}),
        ("decode", 2, 14, 15, True, {1, 2}),
    ]


def test_settling_alone_runs_nothing_else() -> None:
    of = view(None, 15, [WriteRange(1, 0, 10)], settled=4, settled_before=4)
    assert rows("rebase_shared", of) == [("adapter_free", 0, 4, 10, True, {2})]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_with_nothing_pending_the_last_token_runs_again_and_keeps_nothing(scheme: str) -> None:
    of = view(2, 10, [WriteRange(1, 0, 10)], lr_covered=(0, 10, 10))
    assert rows(scheme, of) == [("rerun", 2, 9, 10, False, set())]


def test_catch_up_gives_logits_so_that_nothing_runs_twice() -> None:
    assert rows("base_shared", view(2, 10, [WriteRange(1, 0, 10)])) == [("catch_up", 2, 0, 10, False, {2})]


def test_unknown_scheme() -> None:
    with pytest.raises(RequestError, match="base_lr_shared"):
        scheme_named("shared")
