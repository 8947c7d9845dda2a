"""Times decode attention of the C++ kernel beside plain PyTorch on contiguous buffers and memory bandwidth.

    python -m benchmarks.attention [--contexts 512,2048,8192] [--batches 1,8,32] [--rank 8] [--threads 1]

The heads of SmolLM2-135M: 9 query and 3 KV heads x 64; agents take turns over sequences. "plain" is the faster of two
ways to compute the same in PyTorch for adapters on V: softmax between two products over `[B, H, L, 64 + r]` (values
beside LR values), or scaled_dot_product_attention over the same, with queries and keys padded with zeros. Both take the
query heads of a group as rows of one KV head, apply the up-projection afterwards, and read contiguous buffers, which a
paged cache doesn't have. "q,v": the kernel with adapters on V; "q,k,v": with adapters on K as well (f: rotary). CPU
time, medians of runs in turn. Bandwidth counts each cached number once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention_calls import Heads, paged, rotation
from benchmarks.step import measure_machine
from benchmarks.timing import in_turn
from lragent.kernels import cpp_library

KV_HEADS, GROUP, DIM = 3, 3, 64
HEADS = Heads(KV_HEADS, GROUP, DIM)
SETS = 4  # caches used in turn, where they are small: a model has one a layer
MOST_NUMBERS = 300 << 20  # of one cache: more is left out


@dataclass(frozen=True)
class Contiguous:
    """A step's buffers for plain PyTorch: values and LR columns side by side."""

    query: Tensor  # [B, H, G, D]
    key: Tensor  # [B, H, L, D]
    value: Tensor  # [B, H, L, D + r]
    wide_query: Tensor  # [B, H, G, D + r]
    wide_key: Tensor  # [B, H, L, D + r]
    up: Tensor  # [B, H, r, D], of each sequence's agent


def contiguous(batch: int, context: int, rank: int, dtype: torch.dtype) -> Contiguous:
    query = torch.randn(batch, KV_HEADS, GROUP, DIM).to(dtype)
    key = torch.randn(batch, KV_HEADS, context, DIM).to(dtype)
    zeros = torch.nn.functional.pad
    return Contiguous(
        query=query,
        key=key,
        value=torch.randn(batch, KV_HEADS, context, DIM + rank).to(dtype),
        wide_query=zeros(query, (0, rank)),
        wide_key=zeros(key, (0, rank)),
        up=torch.randn(batch, KV_HEADS, rank, DIM).to(dtype),
    )


def join(wide: Tensor, up: Tensor) -> Tensor:
    return wide[..., :DIM] + wide[..., DIM:] @ up


def products(held: Contiguous) -> Tensor:
    scores = held.query @ held.key.transpose(-1, -2) * DIM**-0.5
    return join(scores.softmax(-1) @ held.value, held.up)


def sdpa(held: Contiguous) -> Tensor:
    attend = torch.nn.functional.scaled_dot_product_attention
    return join(attend(held.wide_query, held.wide_key, held.value, scale=DIM**-0.5), held.up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpp_library.load()
    op = cpp_library.ATTENTION
    machine = measure_machine()
    print(f"read {machine.bandwidth / 1e9:.1f} GB/s, {options.threads} threads")
    for dtype in (torch.float32, torch.bfloat16):
        for context in map(int, options.contexts.split(",")):
            for batch in map(int, options.batches.split(",")):
                numbers = batch * context * 2 * KV_HEADS * DIM
                if numbers > MOST_NUMBERS:
                    continue
                sets = SETS if numbers < 16 << 20 else 1
                rope = rotation(context, DIM)
                ours = [paged(batch, context, options.rank, dtype, HEADS, rope=rope) for _ in range(sets)]
                unpacked = [(each.without_keys.arguments(), each.with_keys.arguments()) for each in ours]
                plain = [contiguous(batch, context, options.rank, dtype) for _ in range(sets)]
                works: dict[str, Callable[[], object]] = {
                    "q,v": lambda ours=unpacked: [op(*without) for without, _ in ours],  # type: ignore[misc]
                    "q,k,v": lambda ours=unpacked: [op(*full) for _, full in ours],  # type: ignore[misc]
                    "products": lambda plain=plain: [products(each) for each in plain],  # type: ignore[misc]
                    "sdpa": lambda plain=plain: [sdpa(each) for each in plain],  # type: ignore[misc]
                }
                times = in_turn(works, options.repeats)
                share_of = sets * options.threads
                found = {name: statistics.median(spent) / share_of for name, spent in times.items()}
                best = min(("products", "sdpa"), key=found.__getitem__)
                values, keys = found["q,v"], found["q,k,v"]
                share = ours[0].bytes_without_keys / values / machine.bandwidth
                print(
                    f"{str(dtype).removeprefix('torch.'):8} {batch:3} x {context:5}: q,v {values * 1e6:9.0f} us "
                    f"({share:4.0%} of bandwidth), plain {found[best] * 1e6:9.0f} us ({best}, "
                    f"{found[best] / values:.2f} x), q,k,v {keys * 1e6:9.0f} us ({keys / values:.2f} x)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
