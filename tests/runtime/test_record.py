"""The record of a trajectory: who generated its tokens, who computed their K/V, and how they were sampled."""

import pytest

from lragent.runtime import AgentSpan, Trajectory, TrajectoryRecord
from tests.runtime.random_operations import SCHEMES, toy_engine


def digest(agent: str) -> str:
    return "" if agent == "base" else f"digest of {agent}"


def spans(*parts: tuple[str, int, int]) -> list[AgentSpan]:
    return [AgentSpan(agent, digest(agent), start, end) for agent, start, end in parts]


def recorded(scheme: str) -> tuple[TrajectoryRecord, Trajectory]:
    engine = toy_engine(scheme)
    t = engine.trajectory([1, 2, 3, 4])
    t.generate("plan", max_new_tokens=3)  # 4 to 7
    t.append([9, 9])
    t.generate("base", max_new_tokens=2, temperature=1.0, top_k=3, seed=11)  # 9 to 11
    t.generate("act", forced=[5, 6])  # 11 to 13
    return t.record(), t


@pytest.mark.parametrize("scheme", SCHEMES)
def test_agents_of_every_token(scheme: str) -> None:
    record, t = recorded(scheme)
    assert record.token_ids == t.token_ids
    assert record.generated == spans(("plan", 4, 7), ("base", 9, 11), ("act", 11, 13))
    if scheme == "non_shared":  # a cache of its own for every agent
        assert record.written == spans(("base", 0, 10), ("plan", 0, 6), ("act", 0, 12))
    elif scheme == "neutral_shared":
        assert record.written == spans(("base", 0, 12))
    else:
        assert record.written == spans(("plan", 0, 6), ("base", 6, 10), ("act", 10, 12))
    t.close()


def test_facts_of_sampling() -> None:
    record, t = recorded("base_lr_shared")
    appended = [True] * 4 + [False] * 3 + [True] * 2 + [False] * 4
    assert [value is None for value in record.logprobs] == appended
    forced = [*appended[:11], True, True]
    for values in (record.sampled_logprobs, record.kept_mass):
        assert [value is None for value in values] == forced
    assert record.sampled_logprobs[4:7] == [0.0] * 3 and record.kept_mass[4:7] == [1.0] * 3
    for raw, after, kept in zip(
        record.logprobs[9:11], record.sampled_logprobs[9:11], record.kept_mass[9:11], strict=True
    ):
        assert raw is not None and after is not None and kept is not None
        assert 0 < kept < 1 and after > raw  # three tokens share the mass
    assert (record.seeds[1], record.finish_reasons, record.stop_reasons) == (11, ["length"] * 3, [None] * 3)
    t.truncate(10)
    cut = t.record()
    assert cut.generated == spans(("plan", 4, 7), ("base", 9, 10))
    assert (cut.seeds, cut.finish_reasons) == (record.seeds[:2], ["length", "truncated"])
    assert len(cut.sampled_logprobs) == len(cut.kept_mass) == len(cut.logprobs) == 10
    t.close()


def test_a_fork_has_what_its_parent_had() -> None:
    record, t = recorded("base_lr_shared")
    with t.fork() as branch:
        assert branch.record() == record
        branch.generate("reflect", max_new_tokens=2)
        assert branch.record().generated == [*record.generated, *spans(("reflect", 13, 15))]
    assert t.record() == record
    t.close()


def test_a_failed_turn_leaves_nothing() -> None:
    engine = toy_engine("base_lr_shared", pages=4)
    with engine.trajectory([1, 2, 3]) as t:
        before = t.record()
        with pytest.raises(Exception, match="doesn't fit"):
            t.generate("plan", max_new_tokens=60)
        assert t.record() == before
