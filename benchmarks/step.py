"""Times single steps of a compiled artifact beside their bound on this machine, and profiles them.

    python -m benchmarks.step ARTIFACT [--sharing base_lr_shared] [--context 512] [--sequences 1,8,32] [--prefill 512]
    python -m benchmarks.step ARTIFACT --device cuda [--backend eager]

Under `neutral_shared` an agent's row of the last token comes after the adapter-free rows of its trajectory.

The bound of a step is the longer of two times: reading the weights once and every sequence's cache, at the measured
read bandwidth, and its floating point operations, at the rate of a GEMM of the artifact's dtype. It assumes that the
shorter one is hidden completely. "In turn" is the sum of both. One thread by default. On the CPU, times are CPU time;
on a GPU, wall time until the device is done.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import lragent
from benchmarks.timing import in_turn, seconds
from lragent.artifact.directory import open_artifact
from lragent.compile.export import CPU
from lragent.program.cache_schema import SCRATCH_PAGE
from lragent.program.dtypes import dtype_named
from lragent.program.program import Program
from lragent.program.step import PAGE_SIZE, StepInputs
from lragent.runtime.cache.memory import allocate
from lragent.runtime.schemes import SCHEMES


@dataclass(frozen=True)
class Machine:
    """Rates for the bound: bytes per second read from memory, operations per second in a large GEMM."""

    bandwidth: float
    gemm: float


def spent(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """CPU seconds on the CPU, wall seconds on a GPU; there, steps become CUDA graphs in the first three runs."""
    if device.type == "cpu":
        return seconds(work, repeats)

    def finished() -> None:
        work()
        torch.cuda.synchronize(device)

    return in_turn({"": finished}, repeats + 3, time.perf_counter)[""][3:]


def measure_machine(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Machine:
    """Best of several runs: the machine's limit, not its usual speed. The GEMM's rate is the better one of `dtype` and
    float32, which is faster on a processor without instructions for `dtype`."""
    size = 1024 if device.type == "cpu" else 8192
    numbers = torch.randn(64 << 20, device=device)
    left, right = torch.randn(2, size, size, device=device)
    products = [min(spent(partial(torch.mm, left.to(d), right.to(d)), device, 7)) for d in {torch.float32, dtype}]
    return Machine(
        bandwidth=numbers.numel() * 4 / min(spent(lambda: numbers.sum(), device, 7)),
        gemm=2 * size**3 / min(products),
    )


def step_inputs(
    program: Program, sequences: int, tokens: int, context: int, sharing: str = "base_lr_shared"
) -> StepInputs:
    """Trajectories with `tokens` new tokens each at the end of `context` tokens; agents take turns over trajectories.

    Under `neutral_shared` a trajectory has two sequences: adapter-free rows of its new tokens, which write, and the
    agent's row of the last one, which reads.
    """
    size, agents, acting_rows = PAGE_SIZE, len(program.agents), int(SCHEMES[sharing].written_as_base)
    pages = -(-context // size)
    table = 1 + torch.arange(sequences * pages).view(sequences, pages)
    new = torch.cat((torch.arange(context - tokens, context), torch.full((acting_rows,), context - 1)))
    slots = table[:, new // size] * size + new % size
    slots[:, tokens:] = SCRATCH_PAGE * size
    agent_ids = (torch.arange(sequences) % agents + 1)[:, None].repeat(1, len(new))
    agent_ids[:, : tokens * acting_rows] = 0
    lengths = torch.tensor([tokens, 1][: 1 + acting_rows]).repeat(sequences)
    return StepInputs(
        token_ids=torch.randint(0, program.vocab_size, (sequences * len(new),)),
        positions=new.repeat(sequences),
        agent_ids=agent_ids.reshape(-1),
        logits_rows=torch.arange(1, sequences + 1) * len(new) - 1,
        base_slots=slots.reshape(-1),
        lr_slots=slots.reshape(-1).repeat(agents, 1),
        seq_starts=torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))),
        context_lens=torch.full_like(lengths, context),
        page_table=table.repeat_interleave(1 + acting_rows, dim=0),
    )


def runner(program: Program, sharing: str, step: StepInputs) -> Callable[[], torch.Tensor]:
    """A function that runs a step over a new cache as large as the step's contexts."""
    dtype, lr_blocks = dtype_named(program.facts["dtype"]), SCHEMES[sharing].lr_blocks
    pages, device = 1 + int(step.page_table.max()), torch.device(program.facts["device"])
    cache = allocate(program.schema, lr_blocks, pages, PAGE_SIZE, dtype, device).tensors
    return partial(program.run, step, cache)


def least_times(
    program: Program, machine: Machine, weights: list[torch.Tensor], size: int, step: StepInputs
) -> tuple[float, float]:
    """Seconds of a step's reads and of its operations (see the module's docstring); `size`: bytes per cached number."""
    schema = program.schema
    tokens, contexts = step.token_ids.numel(), step.context_lens.double()
    # Sequences of one page table read its pages once.
    cache = float(contexts.mean()) * len(step.page_table.unique(dim=0)) * schema.base_numbers_per_token() * size
    # The vocabulary's matrix, the largest one, is multiplied with the rows whose logits are wanted.
    head = max(t.numel() for t in weights)
    products = (sum(t.numel() for t in weights) - head) * tokens + head * step.logits_rows.numel()
    weight_bytes = sum(t.numel() * t.element_size() for t in weights)
    new_S = step.seq_starts.diff()
    keys = float(((contexts - (new_S - 1) / 2) * new_S).sum())
    attention = sum(4 * keys * layer.kv_heads * layer.k_dim for layer in schema.base)
    return (weight_bytes + cache) / machine.bandwidth, (2 * products + attention) / machine.gemm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sharing", default="base_lr_shared")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill step; 0: no prefill step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--profile", action="store_true", help="print the ops that take longest")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = lragent.load(
        options.artifact,
        sharing=options.sharing,
        kv_memory="16MiB",
        device=options.device,
        backend=options.backend,
    ).program
    device, dtype = torch.device(program.facts["device"]), dtype_named(program.facts["dtype"])
    machine = measure_machine(dtype, device)
    print(f"read {machine.bandwidth / 1e9:.1f} GB/s, GEMM {machine.gemm / 1e9:.0f} GFLOP/s, {options.threads} threads")
    held = open_artifact(options.artifact).weights().values()
    matrices = list({t.data_ptr(): t for t in held if t.dim() == 2 and t.is_floating_point()}.values())
    steps = [(int(n), 1, options.context) for n in options.sequences.split(",")]
    if options.prefill:
        steps.append((1, options.prefill, max(options.context, options.prefill)))
    for sequences, tokens, context in steps:
        step = step_inputs(program, sequences, tokens, context, options.sharing)
        run = runner(program, options.sharing, step)
        found = statistics.median(spent(run, device, options.repeats))
        times = least_times(program, machine, matrices, dtype.itemsize, step)
        kind = "decode" if tokens == 1 else "prefill"
        print(
            f"{kind:7} {sequences:3} x {tokens:4} at {context}: {found * 1e3:8.1f} ms, "
            f"{found / max(times):.2f} x bound, {found / sum(times):.2f} x in turn "
            f"(reading {times[0] * 1e3:.1f} ms, arithmetic {times[1] * 1e3:.1f} ms)"
        )
        if options.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                run()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=44))


if __name__ == "__main__":
    main()
