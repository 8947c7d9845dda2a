"""Gold agents: the right texts of plan, action and reflect at every step of a task.

They read the question, the observations and, unlike real agents, the task's chain. They are the teacher in training and
a scripted agent in tests.
"""

import random
from dataclasses import dataclass, field

from examples.fact_world import format as fmt
from examples.fact_world.format import ACTION, PLAN, REFLECT, Piece
from examples.fact_world.relations import BY_NOUN
from examples.fact_world.world import Entity, Fact, Task, World, world_of


@dataclass
class GoldTrajectory:
    """A finished trajectory up to the finish action, with the facts needed to judge it."""

    pieces: list[Piece]
    last_entity: Entity
    facts: list[Fact] = field(default_factory=list)


def first_plan(task: Task) -> str:
    """The steps in the order in which they have to be done, and the first lookup."""
    nouns = task["relations"]
    return f"Steps: {', '.join(nouns)}. Look up {task['start']} for the {nouns[0]}."


def next_plan(noun: str, name: str, mention: str, next_noun: str) -> str:
    """The fact that was found and the entry that is needed next."""
    return f"The {noun} of {name} is {mention}. Look up {mention} for the {next_noun}."


def resolve_plan(mention: str, kind: str, full: str, noun: str) -> str:
    """After a `no entry` observation: picks the close name of the right kind."""
    return f"{mention} has no entry. The {kind} is {full}. Look up {full} for the {noun}."


def last_plan(noun: str, name: str, answer: str) -> str:
    """The fact that was found, as the answer."""
    return f"The {noun} of {name} is {answer}. Finish with {answer}."


def reflection(noun: str, name: str, value: str, answer: str) -> str:
    """The verdict on `answer`, with the fact that decides it."""
    if value == answer:
        return f"The {noun} of {name} is {value}. The answer {answer} is right"
    return f"The {noun} of {name} is {value}. The answer {answer} is wrong"


def reflection_unfinished(noun: str, answer: str) -> str:
    """The verdict when the fact asked for was never looked up."""
    return f"The {noun} was not looked up. The answer {answer} is wrong"


def shorten_entry(world: World, name: str, keep: str, rng: random.Random, sentences: int) -> str:
    """The entry of `name` cut to a few sentences, the one of relation `keep` among them."""
    entity = world.entities[name]
    fact = entity.facts[keep]
    needed = next(
        text
        for text in entity.sentences
        if text.endswith(BY_NOUN[keep].sentence.format(their="", value=fact.mention).lstrip())
    )
    others = [text for text in entity.sentences if text != needed]
    kept = {needed, *rng.sample(others, min(len(others), sentences - 1))}
    text = " ".join(text for text in entity.sentences if text in kept)
    return f"{entity.name} ({entity.kind}): {text}"


def gold_trajectory(
    task: Task, rng: random.Random | None = None, sentences: int | None = None, hops: int = 99
) -> GoldTrajectory:
    """Plays the task with gold agents up to the finish action.

    `sentences` shortens the entries (training starts with short ones), `hops` ends the trajectory
    after that many facts (for reflect, to see answers given too early).
    """
    world = world_of(task)
    pieces = [fmt.opening(task["question"])]

    def turn(plan: str, action: str) -> None:
        pieces.extend((fmt.header(PLAN), fmt.spoken(PLAN, plan)))
        pieces.extend((fmt.header(ACTION), fmt.spoken(ACTION, action)))

    def look_up(plan: str, name: str, keep: str) -> None:
        turn(plan, f"lookup[{name}]")
        if name in world.entities and sentences is not None and rng is not None:
            text = shorten_entry(world, name, keep, rng, sentences)
        else:
            text = world.lookup(name)
        pieces.append(fmt.observation(text))

    nouns = task["relations"]
    facts: list[Fact] = []
    here = task["start"]
    look_up(first_plan(task), here, nouns[0])
    for step, noun in enumerate(nouns):
        fact = world.entities[here].facts[noun]
        facts.append(fact)
        entity = world.entities[here]
        if step + 1 == min(len(nouns), hops):
            break
        next_noun = nouns[step + 1]
        look_up(next_plan(noun, here, fact.mention, next_noun), fact.mention, next_noun)
        if fact.shortened:
            kind = fact.relation.target
            look_up(resolve_plan(fact.mention, kind, fact.value, next_noun), fact.value, next_noun)
        here = fact.value
    last = facts[-1]
    turn(last_plan(last.relation.noun, here, last.mention), f"finish[{last.mention}]")
    return GoldTrajectory(pieces, entity, facts)


def reflect_pieces(text: str) -> list[Piece]:
    """Header and reflection."""
    return [fmt.header(REFLECT), fmt.spoken(REFLECT, text)]
