"""Times one group of projections (MLP gate and up) for several token counts, beside torch.nn.functional.linear.

    python -m benchmarks.projections [--inputs 576] [--features 1536] [--tokens 1,4,8,32,512,2048]

CPU time, medians. Several sets of weights are used in turn, so that weights are read from memory, as in a model.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.timing import seconds
from lragent.kernels import cpp_library, ops
from lragent.program.dtypes import dtype_name

SETS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=576)
    parser.add_argument("--features", type=int, default=1536)
    parser.add_argument("--tokens", default="1,4,8,32,512,2048")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpp_library.load()
    agent_ids = torch.zeros(0, dtype=torch.int64)
    for tokens in map(int, options.tokens.split(",")):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, options.inputs).to(dtype)
            sets = [[torch.randn(options.features, options.inputs).to(dtype) for _ in range(2)] for _ in range(SETS)]

            def ours(x: torch.Tensor = x, sets: list[list[torch.Tensor]] = sets) -> None:
                for weights in sets:
                    ops.routed_linears(x, agent_ids, weights, [-1, -1], [-1, -1], [-1, -1], [0])

            def plain(x: torch.Tensor = x, sets: list[list[torch.Tensor]] = sets) -> None:
                for weights in sets:
                    for weight in weights:
                        torch.nn.functional.linear(x, weight)

            times = [statistics.median(seconds(work, 7)) / SETS for work in (ours, plain)]
            rate = 4 * tokens * options.inputs * options.features / times[0] / 1e9
            name = dtype_name(dtype)
            print(
                f"{tokens:5} tokens {name:8}: routed_linears {times[0] * 1e3:8.2f} ms ({rate:5.1f} GFLOP/s), "
                f"linear {times[1] * 1e3:8.2f} ms"
            )


if __name__ == "__main__":
    main()
