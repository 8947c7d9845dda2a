import pytest

from tests.runtime.random_operations import MODEL, SCHEMES, assert_same, toy_engine
from tests.runtime.toy_oracle import OracleTrajectory

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fork_inside_a_page_shares_until_someone_writes(scheme: str) -> None:
    engine = toy_engine(scheme)
    oracle = OracleTrajectory(MODEL, scheme, PROMPT)
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=4)
        oracle.turn("plan", 4)
        held = engine.stats().pages_held
        branch, other = t.fork(), oracle.fork()
        assert engine.stats().pages_held == held
        for trajectory, reference, name in ((t, oracle, "act"), (branch, other, "reflect"), (t, oracle, "reflect")):
            turn = trajectory.generate(name, max_new_tokens=3)
            assert_same((turn.token_ids, turn.logprobs), reference.turn(name, 3))
        assert held < engine.stats().pages_held < 2 * held + 6
        branch.close()
    assert engine.stats().pages_held == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("length", [3, 8, 9, 12, 13])
def test_truncate_into_other_turns(scheme: str, length: int) -> None:
    engine = toy_engine(scheme)
    oracle = OracleTrajectory(MODEL, scheme, PROMPT)
    with engine.trajectory(PROMPT) as t:
        for name in ("plan", "act"):
            t.generate(name, max_new_tokens=4)
            oracle.turn(name, 4)
        t.truncate(length)
        oracle.truncate(length)
        assert len(t) == length
        assert t.segments()[-1].end == length
        for name in ("act", "base", "plan"):
            turn = t.generate(name, max_new_tokens=2)
            assert_same((turn.token_ids, turn.logprobs), oracle.turn(name, 2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_score_leaves_the_trajectory_and_its_pages_alone(scheme: str) -> None:
    engine = toy_engine(scheme, max_batch_tokens=3)
    oracle = OracleTrajectory(MODEL, scheme, PROMPT)
    with engine.trajectory(PROMPT) as t:
        for tokens in ([11], [11, 12, 13, 14, 15, 16]):
            for name in ("base", "act"):
                assert_same((tokens, t.score(name, tokens)), (tokens, oracle.score(name, tokens)))
        t.generate("plan", max_new_tokens=4)
        oracle.turn("plan", 4)
        held, before = engine.stats().pages_held, t.token_ids
        assert_same(([1, 2], t.score("act", [1, 2])), ([1, 2], oracle.score("act", [1, 2])))
        assert (engine.stats().pages_held, t.token_ids) == (held, before)
        turn = t.generate("act", max_new_tokens=3, forced=[1, 2, 3])
        assert_same((turn.token_ids, turn.logprobs), oracle.turn("act", 3, [1, 2, 3]))


def test_score_equals_the_log_probabilities_of_sampling() -> None:
    engine = toy_engine("base_lr_shared")
    with engine.trajectory(PROMPT) as t:
        turn = t.fork().generate("plan", max_new_tokens=5, temperature=1.0, seed=3)
        assert_same((turn.token_ids, t.score("plan", turn.token_ids)), (turn.token_ids, turn.logprobs))


def test_rebase_delays_the_adapter_free_pass_until_the_trajectory_is_read() -> None:
    engine = toy_engine("rebase_shared")
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=4)
        assert engine.stats().tokens.adapter_free == 0
        branch = t.fork()
        assert engine.stats().tokens.adapter_free == 9
        assert t.generate("act", max_new_tokens=1).usage.adapter_free == 0
        assert branch.generate("act", max_new_tokens=2).usage.adapter_free == 0
        assert t.usage.adapter_free == 9
        branch.close()


def test_rebase_turns_that_nobody_reads_cost_no_adapter_free_pass() -> None:
    engine = toy_engine("rebase_shared")
    with engine.trajectory(PROMPT) as t:
        t.generate("plan", max_new_tokens=4)
        t.truncate(0)
        t.append(PROMPT)
        assert t.generate("base", max_new_tokens=4).usage.adapter_free == 0
        assert t.generate("plan", max_new_tokens=4).usage.adapter_free == 0
