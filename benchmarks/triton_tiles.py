"""Times tile shapes of the Triton attention kernels on this machine's GPU; `variants.py` was chosen by it.

    python -m benchmarks.triton_tiles OUT.jsonl [--kinds decode,prefill] [--calls 8x4x128r8,3x3x64r8]

Tile shapes are compiled by several processes, then timed one by one over caches that don't fit into the GPU's L2, in a
CUDA graph, so that launch times don't count. The output has one line per tile shape, step and number of splits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch

from benchmarks.attention_calls import Heads, Paged, paged
from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention import torch_paged
from lragent.kernels.flash_lora_attention.triton import launch
from lragent.kernels.flash_lora_attention.triton.variants import MiscompiledTiles, Tiles

GPU = torch.device("cuda", 0)
# (sequences, context, new tokens), and splits that are tried
STEPS: dict[str, dict[tuple[int, int, int], tuple[int, ...]]] = {
    "decode": {(32, 2048, 1): (1, 4), (1, 8192, 1): (16, 64)},
    "prefill": {(1, 4096, 1024): (1,), (16, 2048, 200): (1,)},
}
NO_TILES = Tiles(0, 0, 0, 0, 0)
MOST_ERROR = 0.02  # of the largest number: bfloat16 rounds to 1/256
CACHES = 256 << 20  # bytes that one after the other are read
# Values of rows, tokens, channels, warps and stages that are tried.
GRID = {
    "decode": ((8,), (32, 64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "prefill": ((64, 128), (32, 64), (64, 128), (4, 8), (2, 3)),
}


@dataclass(frozen=True)
class Job:
    kind: str
    heads: Heads
    rank: int
    with_keys: bool
    tiles: Tiles


def jobs(kinds: list[str], calls: list[str]) -> list[Job]:
    found = []
    for kind, text, with_keys in itertools.product(kinds, calls, (False, True)):
        heads, rank = text.split("r")
        shape = Heads(*map(int, heads.split("x")))
        for values in itertools.product(*GRID[kind]):
            tiles = Tiles(*values)
            if tiles.channels > shape.dim:
                continue
            found.append(Job(kind, shape, int(rank), with_keys, tiles))
            if tiles.channels < shape.dim:
                found.append(Job(kind, shape, int(rank), with_keys, replace(tiles, unroll=True)))
    return found


def chosen(call: Paged, job: Job) -> AttentionCall:
    return call.with_keys if job.with_keys else call.without_keys


def attend(call: Paged, job: Job, splits: int) -> torch.Tensor:
    return launch.flash_lora_attention(chosen(call, job), launch.LaunchConfig(job.tiles, job.tiles, splits))


def refusal(job: Job) -> str:
    """Runs a small step and returns the reason why a tile shape can't be used; "": it can. Triton caches the kernel.

    Call it in a child process: after an access out of bounds a process can't use the GPU any more.
    """
    try:
        call = paged(2, 320, job.rank, torch.bfloat16, job.heads, 1 if job.kind == "decode" else 200, GPU)
        found, expected = attend(call, job, splits=2), torch_paged.flash_lora_attention(chosen(call, job))
        error = float((found - expected).float().abs().max() / expected.float().abs().max())
        return "" if error < MOST_ERROR else f"off by {error}"
    except MiscompiledTiles as known:
        return str(known)
    except Exception as error:
        return type(error).__name__ + ": " + str(error).partition("\n")[0]


def answer_of(answer: AsyncResult[str]) -> str:
    """The answer of `refusal`; "no answer" if its process crashed."""
    try:
        return answer.get(timeout=60)
    except multiprocessing.TimeoutError:
        return "no answer"


def milliseconds(job: Job, calls: list[Paged], splits: int) -> float:
    """Median over replays of a graph of one call for each cache."""

    def run() -> None:
        for call in calls:
            attend(call, job, splits)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / len(calls))
    return statistics.median(times[1:])


def time_all(members: list[Job], out: Path) -> None:
    """Times tile shapes of one kind of call, and appends a line for each."""
    kind, heads, rank = members[0].kind, members[0].heads, members[0].rank
    for (sequences, length, tokens), tried in STEPS[kind].items():
        one = sequences * length * heads.kv * heads.dim * 4
        count = min(16, 1 + CACHES // one) if kind == "decode" else 2
        calls = [paged(sequences, length, rank, torch.bfloat16, heads, tokens, GPU) for _ in range(count)]
        for job, splits in itertools.product(members, tried):
            found = milliseconds(job, calls, splits)
            line = asdict(job) | {"step": [sequences, length, tokens], "splits": splits, "ms": found}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", default="decode,prefill")
    parser.add_argument(
        "--calls", default="8x4x128r8,8x4x128r64,3x3x64r8", help="KV heads x query heads x channels, rank"
    )
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    wanted = jobs(options.kinds.split(","), options.calls.split(","))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.attention_calls", launch.__name__])
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        answers = [pool.apply_async(refusal, (job,)) for job in wanted]
        refused = [answer_of(answer) for answer in answers]
    for job, reason in zip(wanted, refused, strict=True):
        if reason:
            print(f"{reason}: {job}", flush=True)
    usable = [job for job, reason in zip(wanted, refused, strict=True) if not reason]
    for _, members in itertools.groupby(usable, key=lambda job: replace(job, tiles=NO_TILES)):
        process = context.Process(target=time_all, args=(list(members), options.out))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
