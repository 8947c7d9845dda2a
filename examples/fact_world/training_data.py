"""Training examples: gold trajectories as token ids, with loss on one role's tokens only.

An example may branch: `reflect` has one turn per trajectory, so several endings (a right answer,
wrong ones, one given too early) hang on the same trunk and share its tokens. A branch reads the trunk up
to where it starts and itself, never another branch, exactly as if it were the only ending.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from examples.fact_world import format as fmt
from examples.fact_world.format import ACTION, PLAN, REFLECT, Piece, token_pieces
from examples.fact_world.gold import (
    gold_trajectory,
    last_plan,
    reflect_pieces,
    reflection,
    reflection_unfinished,
)
from examples.fact_world.world import Fact, Task, World, world_of

Tokenize = Callable[[str], list[int]]


def tokenizer_of(model_dir: str | Path) -> Tokenize:
    """Encodes a piece of text with the model's tokenizer, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return tokenize


@dataclass
class Example:
    """A packed example. `visible[i]` is the number of trunk tokens that token i may read."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    is_label: list[bool] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    trunk_limit: list[int] = field(default_factory=list)

    @property
    def branched(self) -> bool:
        """True if the example has branches."""
        return any(self.branch)

    def add(self, ids: list[int], is_label: list[bool], branch: int, start: int) -> None:
        """Adds tokens of the trunk (branch 0) or of a branch that starts at position `start`."""
        self.ids += ids
        self.is_label += is_label
        self.positions += range(start, start + len(ids))
        self.branch += [branch] * len(ids)
        self.trunk_limit += [start if branch else len(ids)] * len(ids)

    def mask(self) -> torch.Tensor:
        """Mask: True where the token of the row reads the token of the column."""
        branch = torch.tensor(self.branch)
        position = torch.tensor(self.positions)
        limit = torch.tensor(self.trunk_limit)
        same = branch[:, None] == branch[None, :]
        causal = position[None, :] <= position[:, None]
        on_trunk = (branch[None, :] == 0) & (position[None, :] < limit[:, None])
        return causal & (same | on_trunk)


def trajectory_example(task: Task, role: str, tokenize: Tokenize, rng: random.Random, sentences: int | None) -> Example:
    """The gold trajectory with loss on the tokens of `role` (plan or action)."""
    ids, roles = token_pieces(gold_trajectory(task, rng, sentences).pieces, tokenize)
    last = max(index for index, owner in enumerate(roles) if owner == role)
    example = Example()
    example.add(ids[: last + 1], [owner == role for owner in roles[: last + 1]], 0, 0)
    return example


def reflect_example(task: Task, tokenize: Tokenize, rng: random.Random, sentences: int | None) -> Example:
    """The trajectory up to its last observation, with endings that are right and wrong."""
    world = world_of(task)
    gold = gold_trajectory(task, rng, sentences)
    trunk = gold.pieces[:-4]
    example = Example()
    trunk_ids, _ = token_pieces(trunk, tokenize)
    example.add(trunk_ids, [False] * len(trunk_ids), 0, 0)

    fact, name = gold.facts[-1], gold.last_entity.name
    noun = fact.relation.noun
    endings = [_ending(noun, name, fact.value, reflection(noun, name, fact.value, fact.value))]
    wrong = wrong_answer(world, gold.last_entity.name, fact, gold.facts, rng)
    endings.append(_ending(noun, name, wrong, reflection(noun, name, fact.value, wrong)))
    starts = [len(trunk_ids)] * 2
    if rng.random() < 0.5:
        early = rng.randrange(1, len(gold.facts))
        short = gold_trajectory(task, rng, sentences, hops=early)
        missed = short.facts[-1]
        ending = _ending(
            missed.relation.noun,
            short.last_entity.name,
            missed.mention,
            reflection_unfinished(noun, missed.mention),
        )
        cut = _pieces_until_observation(trunk, short.pieces)
        endings.append(ending)
        starts.append(len(token_pieces(trunk[:cut], tokenize)[0]))
    for number, (pieces, start) in enumerate(zip(endings, starts, strict=True), start=1):
        ids, roles = token_pieces(pieces, tokenize)
        example.add(ids, [owner == REFLECT for owner in roles], number, start)
    return example


def wrong_answer(world: World, name: str, right: Fact, chain: list[Fact], rng: random.Random) -> str:
    """A believable wrong answer: another fact of the entry, an earlier step, a random value."""
    options = [fact.mention for fact in world.entities[name].facts.values()]
    options += [fact.value for fact in chain]
    options += [rng.choice(world.by_kind["person"]), rng.choice(world.by_kind["town"])]
    same_kind = [
        entity.facts[right.relation.noun].value
        for entity in (world.entities[rng.choice(world.by_kind[right.relation.subject])],)
    ]
    options += same_kind * 4
    return rng.choice([option for option in options if option != right.value])


def _ending(noun: str, name: str, answer: str, verdict: str) -> list[Piece]:
    """The last plan, the finish action and the reflection on it."""
    return [
        fmt.header(PLAN),
        fmt.spoken(PLAN, last_plan(noun, name, answer)),
        fmt.header(ACTION),
        fmt.spoken(ACTION, f"finish[{answer}]"),
        *reflect_pieces(verdict),
    ]


def _pieces_until_observation(trunk: list[Piece], short: list[Piece]) -> int:
    """Number of trunk pieces before the last turn of a trajectory that ends early."""
    cut = len(short) - 4
    if [piece.role for piece in trunk[:cut]] != [piece.role for piece in short[:cut]]:
        raise AssertionError("an early ending must be a prefix of the trunk")
    return cut


def batches(
    tasks: Iterator[Task],
    role: str,
    tokenize: Tokenize,
    rng: random.Random,
    token_budget: int,
    sentences: Callable[[], int | None],
) -> Iterator[list[Example]]:
    """Endless batches of about `token_budget` tokens."""
    batch: list[Example] = []
    for task in tasks:
        batch.append(example_for(task, role, tokenize, rng, sentences()))
        if sum(len(example.ids) for example in batch) >= token_budget:
            yield batch
            batch = []


def example_for(task: Task, role: str, tokenize: Tokenize, rng: random.Random, sentences: int | None) -> Example:
    """The training example of a role."""
    if role == REFLECT:
        return reflect_example(task, tokenize, rng, sentences)
    return trajectory_example(task, role, tokenize, rng, sentences)


def collate(batch: list[Example], pad: int = 0) -> dict[str, torch.Tensor | None]:
    """Pads on the right. `attention_mask` stays None (plain causal) if nothing branches."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad)
    positions = torch.zeros((len(batch), longest), dtype=torch.long)
    is_label = torch.zeros((len(batch), longest), dtype=torch.bool)
    branched = any(example.branched for example in batch)
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(batch), 1, 1) if branched else None
    for row, example in enumerate(batch):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        positions[row, :n] = torch.tensor(example.positions)
        is_label[row, :n] = torch.tensor(example.is_label)
        if mask is not None:
            mask[row, :n, :n] = example.mask()
    return {
        "input_ids": ids,
        "position_ids": positions,
        "is_label": is_label,
        "attention_mask": None if mask is None else mask[:, None],
    }
