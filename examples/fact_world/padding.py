"""Longer tasks: entries that the question does not need stand before it."""

import random

from examples.fact_world.training_data import Tokenize
from examples.fact_world.world import Task, world_of

TRAJECTORY = 550  # tokens of a usual trajectory, instructions included


def padded(task: Task, tokens: int, tokenize: Tokenize) -> Task:
    """The task with an entry `notes`, so long that its trajectory has about `tokens` tokens.

    No note is an entry of the name that the question begins with or of one that its answer stands in.
    """
    world, rng = world_of(task), random.Random(f"{task['id']}-notes")
    names = [name for name in world.entities if name != task["start"]]
    rng.shuffle(names)
    notes: list[str] = []
    left = tokens - TRAJECTORY
    for name in names:
        entry = world.lookup(name)
        if task["answer"] in entry:
            continue
        left -= len(tokenize(f"{entry}\n"))
        if left < 0:
            break
        notes.append(entry)
    return {**task, "notes": "\n".join(notes)}
