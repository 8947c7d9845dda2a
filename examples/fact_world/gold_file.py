"""Writes gold trajectories as a file that `lragent tune` reads: token ids and the spans that agents would generate.

python -m examples.fact_world.gold_file --model MODEL_DIR --n 90 --out gold.jsonl
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.fact_world.format import token_pieces
from examples.fact_world.gold import gold_trajectory, reflect_pieces, reflection
from examples.fact_world.training_data import Tokenize, tokenizer_of
from examples.fact_world.world import SPLITS, Task, make_tasks


def gold_lines(tasks: list[Task], tokenize: Tokenize) -> Iterator[dict[str, Any]]:
    """One line per task: `token_ids`, and `generated` as `[agent, null, start, end]`."""
    for task in tasks:
        gold = gold_trajectory(task)
        fact = gold.facts[-1]
        verdict = reflection(fact.relation.noun, gold.last_entity.name, fact.value, fact.mention)
        ids, roles = token_pieces([*gold.pieces, *reflect_pieces(verdict)], tokenize)
        spans, at = [], 0
        for role, tokens in itertools.groupby(roles):
            length = len(list(tokens))
            if role is not None:
                spans.append([role, None, at, at + length])
            at += length
        yield {"token_ids": ids, "generated": spans}


def write_gold(model: Path, split: str, n: int, out: Path) -> None:
    """Writes the gold trajectories of the first `n` tasks of a split."""
    lines = [json.dumps(line) for line in gold_lines(make_tasks(split, n), tokenizer_of(model))]
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--n", type=int, default=90)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_gold(options.model, options.split, options.n, options.out)
    print(f"wrote {options.n} gold trajectories to {options.out}")


if __name__ == "__main__":
    main()
