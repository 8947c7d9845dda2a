"""Plans of each scheme, as (kind, agent, start, end, writes base, whose columns)."""

from dataclasses import replace

import pytest

from lragent.errors import RequestError
from lragent.runtime.cache.write_log import WriteRange
from lragent.runtime.scheduling.batch import take
from lragent.runtime.schemes import SCHEMES, View, scheme_named, spans_of_decode, spans_of_turn

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


def test_neutral_writes_as_base_and_reads_as_the_acting_agent() -> None:
    of = view(2, 15, [WriteRange(0, 0, 10)], computed=8)
    written = [("replay", 0, 8, 10, True, {1, 2}), ("prefill", 0, 10, 15, True, {1, 2})]
    assert rows("neutral_shared", of) == [*written, ("acting", 2, 14, 15, False, set())]
    assert rows("neutral_shared", replace(of, agent=0)) == written
    acting = spans_of_turn(SCHEMES["neutral_shared"], of, 11)[-1]
    assert (acting.start, acting.end, acting.logits_from) == (11, 15, 11)  # a score


def test_neutral_decodes_in_two_rows() -> None:
    spans = spans_of_decode(SCHEMES["neutral_shared"], 3, 2, 14)
    assert [(s.kind, s.agent, s.start, s.end, s.writes, s.logits_from) for s in spans] == [
        ("decode", 0, 14, 15, True, 15),
        ("acting", 2, 14, 15, False, 14),
    ]
    (alone,) = spans_of_decode(SCHEMES["neutral_shared"], 3, 0, 14)
    assert (alone.kind, alone.agent, alone.writes, alone.logits_from) == ("decode", 0, True, 14)


def test_rows_that_only_read_join_the_step_of_those_that_write() -> None:
    spans = spans_of_turn(SCHEMES["neutral_shared"], view(2, 15, [WriteRange(0, 0, 10)]), 12)
    kinds = [[(piece.span.kind, piece.start, piece.end) for piece in take(spans, budget, 2)] for budget in (4, 6, 9)]
    assert kinds == [
        [("prefill", 10, 14)],
        [("prefill", 10, 15), ("acting", 12, 13)],
        [("prefill", 10, 15), ("acting", 12, 14)],  # two logits rows at most
    ]


def test_rows_that_write_over_the_same_tokens_take_another_step() -> None:
    of = view(2, 15, [WriteRange(1, 0, 10)], computed=0, settled=0, settled_before=0)
    spans = spans_of_turn(SCHEMES["rebase_shared"], of, 14)
    assert [span.kind for span in spans] == ["replay", "adapter_free", "prefill"]
    assert [piece.span.kind for piece in take(spans, 100, 100)] == ["replay"]
    assert [piece.span.kind for piece in take(spans[1:], 100, 100)] == ["adapter_free", "prefill"]


def test_settling_alone_runs_nothing_else() -> None:
    of = view(None, 15, [WriteRange(1, 0, 10)], settled=4, settled_before=4)
    assert rows("rebase_shared", of) == [("adapter_free", 0, 4, 10, True, {2})]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_with_nothing_pending_the_last_token_runs_again_and_keeps_nothing(scheme: str) -> None:
    of = view(2, 10, [WriteRange(1, 0, 10)], lr_covered=(0, 10, 10))
    kind = "acting" if scheme == "neutral_shared" else "rerun"
    assert rows(scheme, of) == [(kind, 2, 9, 10, False, set())]


def test_catch_up_gives_logits_so_that_nothing_runs_twice() -> None:
    assert rows("base_shared", view(2, 10, [WriteRange(1, 0, 10)])) == [("catch_up", 2, 0, 10, False, {2})]


def test_unknown_scheme() -> None:
    with pytest.raises(RequestError, match="base_lr_shared"):
        scheme_named("shared")
