"""Decides the order of examples: held-out ones, the batch of each step, and the scheme and writers of each step.

Everything follows from the seed and the number of the step, so that a resumed run goes on as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lragent.program.agent import BASE
from lragent.runtime.schemes import EXACT
from lragent.training.turn_sequence import Turn
from lragent.tuning.examples import Example
from lragent.tuning.options import TuneOptions

# Schemes under which a token's K/V don't depend on the agent that processes it first.
WITHOUT_WRITERS = (EXACT, "neutral_shared")

MOST_HELD_OUT = 40
HELD_OUT_BATCHES = 20  # their tokens, in batches of a step


@dataclass(frozen=True)
class Split:
    """Indices of examples: those that steps learn from, and those that they never see."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Args:
        indices: of the examples.
        examples: the same, with turns of other agents over appended tokens where writers are permuted.
        scheme: the sharing scheme of the step's loss.
    """

    indices: tuple[int, ...]
    examples: tuple[Example, ...]
    scheme: str


def split_examples(lengths: Sequence[int], options: TuneOptions) -> Split:
    """Holds out a share of the examples; at least one, and never all, unless the share is 0.

    Of very many or long examples fewer are held out (`MOST_HELD_OUT`): every evaluation runs them all.

    Args:
        lengths: tokens of each example.
    """
    count = len(lengths)
    order = _shuffled(range(count), f"held out {options.seed}")
    most = min(max(1, round(options.held_out * count)), count - 1, MOST_HELD_OUT) if options.held_out > 0 else 0
    sums = accumulate(lengths[index] for index in order[:most])
    fitting = sum(tokens <= HELD_OUT_BATCHES * options.batch_tokens for tokens in sums)
    number = min(most, max(1, fitting))
    return Split(tuple(sorted(order[number:])), tuple(sorted(order[:number])))


def learned_from(batches: Iterable[Batch]) -> tuple[int, ...]:
    """Indices of the examples of batches, each once, in order."""
    return tuple(sorted({index for batch in batches for index in batch.indices}))


def pack(lengths: Sequence[int], order: Iterator[int], budget: int) -> Iterator[tuple[int, ...]]:
    """Packs whole examples into batches, in order.

    A batch has one example, or more of them up to `budget` tokens; no example twice.
    """
    batch: list[int] = []
    for index in order:
        full = sum(lengths[i] for i in batch) + lengths[index] > budget
        if batch and (full or index in batch):
            yield tuple(batch)
            batch = []
        batch.append(index)
    if batch:
        yield tuple(batch)


def batches_of_steps(examples: Sequence[Example], train: Sequence[int], options: TuneOptions) -> Iterator[Batch]:
    """Yields the batch of each step, without end; every epoch has an order of its own."""
    lengths = [example.tokens for example in examples]
    return (
        Batch(picked, tuple(examples[i] for i in picked), "")
        for picked in pack(lengths, _epochs(train, options.seed), options.batch_tokens)
    )


def for_step(batch: Batch, step: int, scheme: str, agents: Sequence[str], options: TuneOptions) -> Batch:
    """The batch with the scheme and the writers of its step."""
    rng = random.Random(f"step {options.seed} {step}")
    whole, permuted = rng.random() < options.non_shared_share, rng.random() < options.permuted_writers
    if whole:
        return dataclasses.replace(batch, scheme=EXACT)
    examples = batch.examples
    if permuted and scheme not in WITHOUT_WRITERS:
        examples = tuple(with_other_writers(example, agents, rng) for example in examples)
    return dataclasses.replace(batch, examples=examples, scheme=scheme)


def with_other_writers(example: Example, agents: Sequence[str], rng: random.Random) -> Example:
    """Lets agents drawn at random process appended tokens first, all but the last one before a turn.

    Each piece of appended tokens becomes a turn that is not scored. The last token before a turn stays with the turn's
    agent, whose logits it gives. Appended tokens are not in the loss: the teacher's states are of their own agent.
    """
    turns: list[Turn] = []
    scored: list[bool] = []
    end = 0
    for turn, flag in zip(example.sequence.turns, example.scored, strict=True):
        start = max(end, 1)
        if turn.start - start >= 1 and turn.agent != BASE:
            turns.append(Turn(rng.choice(agents), start, turn.start))
            scored.append(False)
        turns.append(turn)
        scored.append(flag)
        end = turn.end
    sequence = dataclasses.replace(example.sequence, turns=tuple(turns))
    return dataclasses.replace(example.without_appended(), sequence=sequence, scored=tuple(scored))


def _epochs(train: Sequence[int], seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from _shuffled(train, f"epoch {seed} {epoch}")
        epoch += 1


def _shuffled(indices: Sequence[int], seed: str) -> list[int]:
    order = list(indices)
    random.Random(seed).shuffle(order)
    return order
