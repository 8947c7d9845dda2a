"""Runs held-out tasks with plain PEFT (one cache per adapter) through the workflow.

python -m examples.fact_world.evaluate_peft --model MODEL_DIR --n 50
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from examples.fact_world.format import ROLES
from examples.fact_world.peft_trajectory import PeftAgents, PeftTrajectory
from examples.fact_world.workflow import workflow
from examples.fact_world.world import SPLITS, Task, make_tasks

ADAPTERS = Path(__file__).parent / "adapters"


def evaluate(agents: PeftAgents, tasks: list[Task]) -> list[dict[str, Any]]:
    """One row per task: the workflow's result, hops, tokens and the text of the trajectory."""
    rows = []
    for task in tasks:
        trajectory = PeftTrajectory(agents)
        result = asyncio.run(workflow(task, trajectory))
        rows.append(
            {
                "id": task["id"],
                "hops": task["hops"],
                "gold": task["answer"],
                **result,
                "tokens": len(trajectory.token_ids),
                "pieces": trajectory.pieces,
            }
        )
        print(
            f"{task['id']} hops {task['hops']} {'ok  ' if result['exact_match'] else 'MISS'} "
            f"{result['answer']!r} (gold {task['answer']!r}) verdict {result['verdict']}",
            flush=True,
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of an evaluation."""

    def share(key: str, chosen: list[dict[str, Any]]) -> float | None:
        return round(statistics.mean(row[key] for row in chosen), 4) if chosen else None

    tokens = [row["tokens"] for row in rows]
    return {
        "tasks": len(rows),
        "exact_match": share("exact_match", rows),
        "exact_match_2_hops": share("exact_match", [r for r in rows if r["hops"] == 2]),
        "exact_match_3_hops": share("exact_match", [r for r in rows if r["hops"] == 3]),
        "verdict_correct": share("verdict_correct", rows),
        "mean_steps": share("steps", rows),
        "trajectory_tokens": {
            "mean": round(statistics.mean(tokens)),
            "min": min(tokens),
            "max": max(tokens),
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0, help="leaves out the first tasks, to share a run out")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other tasks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="writes one JSON line a task")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    agents = PeftAgents(args.model, {role: args.adapters / role for role in ROLES})
    started = time.monotonic()
    rows = evaluate(agents, make_tasks(args.split, args.skip + args.n, seed=args.seed)[args.skip :])
    if args.out is not None:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    figures = summary(rows) | {"seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
