"""Thousands of trajectories through a tiny model in one engine: speed and memory must not change from first to last.

    python -m benchmarks.endurance [--trajectories 2000] [--sharing base_lr_shared] [--concurrency 32]

The model is a random two-layer one with three agents, so the runtime's own work dominates. Prints one line per
tenth of the trajectories.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import lragent
from tests.models import write_model


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def take_turns(task: dict[str, Any], trajectory: lragent.Trajectory) -> dict[str, Any]:
    rng = random.Random(task["seed"])
    trajectory.append([rng.randrange(100) for _ in range(64)])
    for agent in ("plan", "action", "plan", "action", "reflect"):
        await trajectory.agenerate(agent, max_new_tokens=8, ignore_eos=True)
        trajectory.append([rng.randrange(100) for _ in range(24)])
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--sharing", default="base_lr_shared")
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        written = write_model(Path(scratch), "llama")
        artifact = Path(scratch) / "tiny.lragent"
        lragent.convert(written.model_dir, written.adapters, artifact, compiled=False)
        # Little memory: pages kept for reuse are given up all the time.
        engine = lragent.load(artifact, sharing=options.sharing, kv_memory="8MiB", backend="eager")
        part = options.trajectories // 10
        for tenth in range(10):
            before, started = engine.stats(), time.process_time()
            tasks = [{"id": seed, "seed": seed} for seed in range(tenth * part, (tenth + 1) * part)]
            for result in engine.run(take_turns, tasks, options.concurrency):
                if result.error is not None:
                    raise RuntimeError(f"trajectory {result.task_id}: {result.error}")
            spent, after = time.process_time() - started, engine.stats()
            tokens = after.tokens.computed - before.tokens.computed
            print(
                f"{(tenth + 1) * part:6} trajectories: {tokens / spent:7.0f} tokens a CPU second, "
                f"{(after.steps - before.steps):5} steps, resident {resident_bytes() / 2**20:6.0f} MiB, "
                f"{after.evictions} evictions, {after.preemptions} preemptions, {after.pages_held} pages held",
                flush=True,
            )


if __name__ == "__main__":
    main()
