"""Runs a fixed token workload on an artifact and prints one line `RESULT {json}`, for comparison with other engines.

    python -m benchmarks.token_workload ARTIFACT WORKLOAD.json [--sharing base_lr_shared] [--threads 2] [--forks 1]

The workload holds token ids only: for each trajectory a prompt and observations, for each agent a header and the number
of tokens to generate. A step is a plan turn, an action turn and an observation; a reflect turn ends the trajectory.
Greedy, end of text ignored. The time excludes loading and one short warm-up trajectory. With `--forks F` every
trajectory is forked F - 1 times after its prompt, and all branches do all steps.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lragent


@dataclass
class Measured:
    """Generated tokens and times of all turns."""

    generated: list[list[int]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # seconds
    first_token_at_switch: list[float] = field(default_factory=list)


async def run_steps(workload: dict[str, Any], trajectory: lragent.Trajectory, spec: Any, measured: Measured) -> None:
    last = ""

    async def turn(agent: str) -> None:
        nonlocal last
        trajectory.append(workload["header"][agent])
        result = await trajectory.agenerate(agent, max_new_tokens=workload["gen"][agent], ignore_eos=True)
        trajectory.append(workload["footer"])
        measured.generated.append(result.token_ids)
        measured.first_token.append(result.usage.ttft)
        if last not in ("", agent):
            measured.first_token_at_switch.append(result.usage.ttft)
        last = agent

    for observation in spec["obs"]:
        await turn("plan")
        await turn("action")
        trajectory.append(observation)
    await turn("reflect")


async def run_all(
    engine: lragent.Engine, workload: dict[str, Any], concurrency: int, forks: int, measured: Measured
) -> list[lragent.Trajectory]:
    places = asyncio.Semaphore(concurrency)
    held: list[lragent.Trajectory] = []

    async def run_one(spec: Any) -> None:
        async with places:
            root = engine.trajectory(spec["prompt"])
            branches = [root, *(root.fork() for _ in range(forks - 1))]
            held.extend(branches)
            await asyncio.gather(*(run_steps(workload, branch, spec, measured) for branch in branches))

    await asyncio.gather(*(run_one(spec) for spec in workload["trajs"]))
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--sharing", default="base_lr_shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--forks", type=int, default=1)
    parser.add_argument("--n", type=int, default=0, help="number of trajectories, from the first; 0: all")
    parser.add_argument("--kv-memory", default="4GiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workload = json.loads(options.workload.read_text())
    workload["trajs"] = workload["trajs"][: options.n or None]

    started = time.perf_counter()
    engine = lragent.load(
        options.artifact,
        sharing=options.sharing,
        kv_memory=options.kv_memory,
        device=options.device,
        backend=options.backend,
    )
    loaded = time.perf_counter() - started
    first = workload["trajs"][0]
    short = {**workload, "trajs": [{"prompt": first["prompt"][::-1][:96], "obs": [first["obs"][0][::-1]]}]}
    for trajectory in asyncio.run(run_all(engine, short, 1, 1, Measured())):
        trajectory.close()

    before = engine.stats().tokens.prefill
    measured = Measured()
    started, cpu = time.perf_counter(), time.process_time()
    held = asyncio.run(run_all(engine, workload, options.concurrency, options.forks, measured))
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    stats = engine.stats()
    generated = sum(map(len, measured.generated))
    digest = hashlib.sha1(json.dumps(sorted(measured.generated)).encode()).hexdigest()
    result = {
        "name": f"lragent-{options.sharing}",
        "peer": "lragent",
        "mode": options.sharing,
        "dtype": engine.program.facts["dtype"],
        "device": options.device,
        "backend": engine.program.facts["backend"],
        "threads": options.threads,
        "trajs": len(held),
        "turns": len(measured.generated),
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "gen_tokens": generated,
        "gen_tok_s": round(generated / wall, 2),
        "prefill_tokens": stats.tokens.prefill - before,
        "ttft_switch_ms": round(statistics.median(measured.first_token_at_switch) * 1e3, 2),
        "ttft_sum_s": round(sum(measured.first_token_at_switch), 3),
        "kv_bytes": stats.held_bytes,
        "kv_mb": round(stats.held_bytes / 2**20, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load_s": round(loaded, 2),
        "gen_sha": digest[:10],
        "first_ids": measured.generated[0][:8],
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
