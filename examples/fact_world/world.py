"""A seeded knowledge base, its `lookup` tool, and multi-hop questions over it.

Two worlds exist for a seed: `train` and `test`. Names are drawn once and dealt out to the two, and
facts lead only to entities of the same world, so no test entity can turn up in a training task.

    python -m examples.fact_world.world --split test --n 100 --out tasks.jsonl
"""

import argparse
import difflib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from examples.fact_world import names
from examples.fact_world.relations import (
    BY_SUBJECT,
    FILLER,
    FILLER_PER_ENTRY,
    KINDS,
    Relation,
)

DEFAULT_SEED = 2601
SPLITS = ("train", "test")
# Entities of each kind that a world holds.
SIZES = {
    "train": {"person": 700, "company": 100, "town": 100, "school": 60, "region": 24},
    "test": {"person": 250, "company": 60, "town": 60, "school": 24, "region": 10},
}
# How often a fact names a town or company by its first word only, which has no entry.
SHORT_MENTION_RATE = 0.2
OPENINGS = ("What is the {chain}?", "Name the {chain}.", "Find the {chain}.", "Tell me the {chain}.")

Task = dict[str, Any]


@dataclass(frozen=True)
class Fact:
    """One fact: the full value, and how the entry words it (perhaps a shorter name)."""

    relation: Relation
    value: str
    mention: str

    @property
    def shortened(self) -> bool:
        """True if the entry gives only the first word of the name."""
        return self.mention != self.value


@dataclass(frozen=True)
class Entity:
    """A named thing with its facts by relation noun and the sentences of its entry."""

    name: str
    kind: str
    facts: dict[str, Fact]
    sentences: tuple[str, ...]


class World:
    """The knowledge base of one split."""

    def __init__(self, seed: int, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self.seed = seed
        self.split = split
        self._rng = random.Random(f"{seed}-{split}")
        self.by_kind = _deal_names(seed)[split]
        self.entities: dict[str, Entity] = {}
        spouses = self._marry(self.by_kind["person"])
        for kind in KINDS:
            for name in self.by_kind[kind]:
                self.entities[name] = self._describe(name, kind, spouses)

    def lookup(self, name: str) -> str:
        """The tool: the entry of `name`, or a text that there is none, with close names."""
        entity = self.entities.get(name.strip())
        if entity is not None:
            return f"{entity.name} ({entity.kind}): {' '.join(entity.sentences)}"
        close = ", ".join(f"{near} ({self.entities[near].kind})" for near in self.close_names(name))
        return f"There is no entry for {name.strip()}. Close names: {close or 'none'}."

    def close_names(self, name: str, limit: int = 4) -> list[str]:
        """Names that begin with the same word (not people), else names with similar spelling."""
        first = name.split()[0] if name.split() else ""
        same_word = sorted(
            entity.name
            for entity in self.entities.values()
            if entity.kind != "person" and entity.name.split()[0] == first
        )
        if same_word:
            return same_word[:limit]
        return difflib.get_close_matches(name, sorted(self.entities), n=limit, cutoff=0.6)

    def tasks(self, seed: int = 0) -> Iterator[Task]:
        """Endless stream of distinct tasks, the same ones for the same seed."""
        rng = random.Random(f"{self.seed}-{self.split}-tasks-{seed}")
        seen: set[tuple[str, ...]] = set()
        while True:
            task = self._draw_task(rng)
            if task is None:
                continue
            key = (task["start"], *task["relations"])
            if key in seen:
                continue
            seen.add(key)
            task["id"] = f"{self.split}-{self.seed}-{seed}-{len(seen) - 1:05d}"
            yield task

    def _draw_task(self, rng: random.Random) -> Task | None:
        """A random walk along relations; None if the walk returns to an entity it has visited."""
        kind = rng.choices(KINDS, weights=(5, 2, 2, 1, 1))[0]
        start = rng.choice(self.by_kind[kind])
        hops = rng.choices((2, 3), weights=(2, 3))[0]
        here, visited, chain = start, {start}, []
        for hop in range(hops):
            last = hop == hops - 1
            entity = self.entities[here]
            open_facts = [
                fact
                for noun, fact in entity.facts.items()
                if noun not in chain and (not fact.shortened if last else fact.relation.leads_to_entity)
            ]
            if not open_facts:
                return None
            fact = rng.choice(open_facts)
            if fact.value in visited:
                return None
            visited.add(fact.value)
            chain.append(fact.relation.noun)
            here = fact.value
        phrase = " of the ".join(reversed(chain)) + f" of {start}"
        return {
            "id": "",
            "question": rng.choice(OPENINGS).format(chain=phrase),
            "answer": here,
            "hops": hops,
            "start": start,
            "relations": chain,
            "world_seed": self.seed,
            "split": self.split,
        }

    def _marry(self, people: list[str]) -> dict[str, str]:
        """Pairs up the people, so that spouses are mutual."""
        shuffled = self._rng.sample(people, len(people))
        pairs = list(zip(shuffled[::2], shuffled[1::2], strict=True))
        return dict(pairs) | {right: left for left, right in pairs}

    def _describe(self, name: str, kind: str, spouses: dict[str, str]) -> Entity:
        """Draws the facts of one entity and writes its entry."""
        rng = self._rng
        they, their = ("She", "Her") if name.split()[0] in names.FEMALE_NAMES else ("He", "His")
        facts: dict[str, Fact] = {}
        used = {name}
        for relation in BY_SUBJECT[kind]:
            value = spouses[name] if relation.noun == "spouse" else self._draw_value(relation, used)
            used.add(value)
            may_shorten = relation.target in ("town", "company")
            short = may_shorten and rng.random() < SHORT_MENTION_RATE
            facts[relation.noun] = Fact(relation, value, value.split()[0] if short else value)
        sentences = [fact.relation.sentence.format(their=their, value=fact.mention) for fact in facts.values()]
        sentences += [
            text.format(they=they, they_lower=they.lower()) for text in rng.sample(FILLER[kind], FILLER_PER_ENTRY)
        ]
        rng.shuffle(sentences)
        return Entity(name, kind, facts, tuple(sentences))

    def _draw_value(self, relation: Relation, used: set[str]) -> str:
        """A value for the relation that the entity has not used yet."""
        while True:
            value = self._draw_any_value(relation.target)
            if value not in used:
                return value

    def _draw_any_value(self, target: str) -> str:
        rng = self._rng
        if target in KINDS:
            return rng.choice(self.by_kind[target])
        if target == "year":
            return str(rng.randint(1801, 1999))
        if target == "river":
            return f"{rng.choice(names.PLACE_WORDS)} River"
        return rng.choice(
            {
                "product": names.PRODUCTS,
                "instrument": names.INSTRUMENTS,
                "weekday": names.WEEKDAYS,
                "flower": names.FLOWERS,
                "colour": names.COLOURS,
            }[target]
        )


def _deal_names(seed: int) -> dict[str, dict[str, list[str]]]:
    """Draws every name and deals it to one split; in a split, a first word is unique per kind.

    People are the exception (first names repeat). The uniqueness makes a shortened town or company
    name resolvable: only one town and one company begin with that word.
    """
    rng = random.Random(f"{seed}-names")
    first_names = names.FEMALE_NAMES + names.MALE_NAMES
    people = [f"{first} {last}" for first in first_names for last in names.SURNAMES]
    rng.shuffle(people)
    suffixes = {
        "company": names.COMPANY_SUFFIXES,
        "town": names.TOWN_SUFFIXES,
        "school": names.SCHOOL_SUFFIXES,
        "region": names.REGION_SUFFIXES,
    }
    dealt: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    taken: set[str] = set()
    for split in SPLITS:
        dealt[split]["person"] = [people.pop() for _ in range(SIZES[split]["person"])]
        for kind, endings in suffixes.items():
            chosen = []
            for word in rng.sample(names.PLACE_WORDS, SIZES[split][kind]):
                free = [f"{word} {end}" for end in endings if f"{word} {end}" not in taken]
                chosen.append(rng.choice(free))
            taken.update(chosen)
            dealt[split][kind] = chosen
    return dealt


@lru_cache(maxsize=8)
def build_world(seed: int, split: str) -> World:
    """The world of a seed and split, built once."""
    return World(seed, split)


def world_of(task: Task) -> World:
    """The world that a task belongs to."""
    return build_world(task["world_seed"], task["split"])


def make_tasks(split: str, n: int, world_seed: int = DEFAULT_SEED, seed: int = 0) -> list[Task]:
    """The first `n` tasks of a split."""
    return list(islice(build_world(world_seed, split).tasks(seed), n))


def main(argv: list[str] | None = None) -> None:
    """Command line: writes tasks as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--world-seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other tasks")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    tasks = make_tasks(args.split, args.n, args.world_seed, args.seed)
    args.out.write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    print(f"wrote {len(tasks)} {args.split} tasks to {args.out}")


if __name__ == "__main__":
    main()
