"""The order of examples, and the writers of a step."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from lragent.training.schemes import SCHEME_ROWS
from lragent.training.turn_sequence import Turn, TurnSequence
from lragent.tuning.batch_rows import rows_of_examples, token_weights
from lragent.tuning.batches import (
    MOST_HELD_OUT,
    Batch,
    Split,
    batches_of_steps,
    for_step,
    pack,
    split_examples,
    with_other_writers,
)
from lragent.tuning.examples import Example
from lragent.tuning.options import TuneOptions

AGENTS = ("plan", "action", "reflect")


def example(tokens: int, appended_kl: float = 0.0) -> Example:
    turns = (Turn("plan", 6, 9), Turn("action", 9, 11), Turn("reflect", 12, tokens))
    return Example(TurnSequence(tuple(range(tokens)), turns), (True, False, True), 1.0, 0.0, (), "", appended_kl)


def test_some_are_held_out_and_never_all() -> None:
    def split_examples_of(count: int, held_out: float, seed: int = 0) -> Split:
        return split_examples([50] * count, TuneOptions(held_out=held_out, seed=seed))

    split = split_examples_of(20, 0.1)
    assert len(split.held_out) == 2 and sorted(split.train + split.held_out) == list(range(20))
    assert split_examples_of(20, 0.1) == split != split_examples_of(20, 0.1, seed=1)
    assert split_examples_of(3, 0.01).train != ()
    assert len(split_examples_of(2, 0.9).train) == 1
    assert split_examples_of(1, 0.5).held_out == ()
    assert split_examples_of(5, 0.0).held_out == ()


def test_of_many_or_long_examples_few_are_held_out() -> None:
    options = TuneOptions(batch_tokens=100)
    assert len(split_examples([10] * 3000, options).held_out) == MOST_HELD_OUT
    long = split_examples([450] * 300, options)  # 2,000 tokens at most
    assert len(long.held_out) == 4 and len(long.train) == 296
    assert len(split_examples([9000] * 30, options).held_out) == 1


def test_whole_examples_are_packed_up_to_the_budget() -> None:
    lengths = [40, 50, 30, 200, 10]
    assert list(pack(lengths, iter(range(5)), 100)) == [(0, 1), (2,), (3,), (4,)]
    assert list(pack(lengths, iter([4, 4, 4]), 100)) == [(4,), (4,), (4,)]


def test_every_epoch_takes_each_example_once_in_another_order() -> None:
    examples = [example(20) for _ in range(6)]
    options = TuneOptions(batch_tokens=40)
    first = [i for batch in islice(batches_of_steps(examples, range(6), options), 6) for i in batch.indices]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6)) and first[:6] != first[6:]


def test_appended_tokens_are_predicted_by_the_agent_whose_turn_follows() -> None:
    plain, both = example(20), example(20, appended_kl=0.5)
    assert both.predicted.turns == (Turn("plan", 1, 9), Turn("action", 9, 11), Turn("reflect", 11, 20))
    assert both.generated == (False,) * 5 + (True,) * 3 + (False,) + (True,) * 8
    assert both.without_appended() == plain and plain.predicted == plain.sequence and all(plain.generated)
    for scheme in SCHEME_ROWS:
        few, more = (rows_of_examples(scheme, [e], AGENTS) for e in (plain, both))
        assert more.targets_R.tolist() == [*range(1, 9), *range(11, 20)]
        assert more.target_agents_R.tolist() == [1] * 8 + [3] * 9
        if scheme != "neutral_shared":  # acting rows are those that predict
            assert len(more.token_ids_N) == len(few.token_ids_N)
        kept = torch.tensor(both.generated)
        assert more.targets_R[kept].tolist() == few.targets_R.tolist()


def test_weights_are_means_over_generated_and_over_appended_tokens() -> None:
    first, second = example(20, appended_kl=0.5), replace(example(14, appended_kl=0.5), kl=2.0, cross_entropy=3.0)
    found = token_weights((first, second), torch.device("cpu"))
    generated, appended = 11 + 5, 6 + 6
    assert float(found.kl_R.sum()) == pytest.approx((11 * 1 + 5 * 2) / generated)
    assert float(found.cross_entropy_R.sum()) == pytest.approx(5 * 3 / generated)
    assert float(found.appended_kl_R.sum()) == pytest.approx((6 * 0.5 + 6 * 2 * 0.5) / appended)
    assert not (found.kl_R * found.appended_kl_R).any()
    alone = token_weights((example(20),), torch.device("cpu"))
    assert not alone.appended_kl_R.any() and float(alone.kl_R.sum()) == pytest.approx(1)


def test_other_writers_take_appended_tokens_and_leave_the_loss_as_it_is() -> None:
    one = example(20, appended_kl=0.5)
    changed = with_other_writers(one, AGENTS, random.Random(3))
    added = [turn for turn in changed.sequence.turns if turn not in one.sequence.turns]
    assert [(turn.start, turn.end) for turn in added] == [(1, 6), (11, 12)]
    plain, permuted = (rows_of_examples("base_lr_shared", [e], AGENTS) for e in (one.without_appended(), changed))
    assert permuted.targets_R.tolist() == plain.targets_R.tolist() == [6, 7, 8, *range(12, 20)]
    assert permuted.target_agents_R.tolist() == plain.target_agents_R.tolist()
    agents = permuted.agent_ids_N.tolist()
    assert agents[5] == 1 and plain.agent_ids_N.tolist()[:6] == [1] * 6  # the row before a turn is the agent's own
    assert agents[:5] == [AGENTS.index(added[0].agent) + 1] * 5


def test_a_step_has_the_scheme_and_the_writers_of_its_number() -> None:
    batch = Batch((0,), (example(20),), "")
    shares = TuneOptions(non_shared_share=0.3, permuted_writers=0.5)
    steps = [for_step(batch, step, "base_lr_shared", AGENTS, shares) for step in range(200)]
    assert steps[7] == for_step(batch, 7, "base_lr_shared", AGENTS, shares)
    whole = [one for one in steps if one.scheme == "non_shared"]
    permuted = [one for one in steps if one.examples != batch.examples]
    assert 40 < len(whole) < 80 and 45 < len(permuted) < 95
    assert all(one.scheme == "base_lr_shared" for one in permuted)
    always = TuneOptions(permuted_writers=1.0)
    assert for_step(batch, 0, "neutral_shared", AGENTS, always).examples == batch.examples  # it knows no writers
