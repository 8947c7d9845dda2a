"""Times the projections of a layer with adapters on all linear layers, for several numbers of agents and tokens.

    python -m benchmarks.adapters [--rank 8] [--agents 3,8,32] [--tokens 1,8,128] [--one-agent]

A layer of SmolLM2-135M's size (576 channels, 192 of K and V, 1536 of the MLP), float32, one thread; tokens are of
random agents. CPU time, medians of ratios of runs in turn. "stacked": plain PyTorch, every agent's A and B as one
matrix, masked by agent. "routed_linears": the C++ kernel. It multiplies a token with its own agent's B only, and with
its own agent's A only unless the LR values of all agents are cached (`dense`: never cached; `split`: on K and V). The
time to pass a call its lists from Python is included: about 25 us per layer with 3 agents, 120 us with 32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import in_turn
from lragent.kernels import cpp_library, ops

# Of each group of projections with one input: input channels, and output channels by whether the cache takes it.
GROUPS = ((576, ((576, False), (192, True), (192, True))), (576, ((576, False),)), (576, ((1536, False),) * 2),
          (1536, ((576, False),)))  # fmt: skip
REPEATS = 25
LAYERS = 4  # used in turn, so that weights come from memory as in a model


@dataclass(frozen=True)
class Group:
    """Projections of one input, their adapters stacked over agents, and which of their LR values are cached."""

    weights: list[Tensor]
    downs: list[Tensor]  # [agents * rank, inputs]
    ups: list[Tensor]  # [agents * rank, features]
    cached: list[bool]


def layer(agents: int, rank: int) -> list[Group]:
    return [
        Group(
            weights=[torch.randn(out, inputs) for out, _ in outs],
            downs=[torch.randn(agents * rank, inputs) for _ in outs],
            ups=[torch.randn(agents * rank, out) for out, _ in outs],
            cached=[cached for _, cached in outs],
        )
        for inputs, outs in GROUPS
    ]


def plain(group: Group, x: Tensor, ids: Tensor) -> None:
    count = len(group.weights)
    ops.routed_linears(x, ids, group.weights, [-1] * count, [-1] * count, [-1] * count, [0])


def stacked(group: Group, x: Tensor, ids: Tensor, mask: Tensor) -> None:
    linear = torch.nn.functional.linear
    plain(group, x, ids)
    for down, up in zip(group.downs, group.ups, strict=True):
        linear(x, down) * mask[ids] @ up


def routed(group: Group, x: Tensor, ids: Tensor, routes: list[int], split: bool) -> None:
    """One call; in `split` layout attention adds the deltas of K and V, and their LR values are outputs."""
    streams = [split and cached for cached in group.cached]
    extra = [down for down, stream in zip(group.downs, streams, strict=True) if stream]
    tensors = [*group.weights, *extra]
    count = len(tensors)
    down_of, up_of = [-1] * count, [-1] * count
    for i, stream in enumerate(streams):
        if not stream:
            down_of[i], up_of[i] = len(tensors), len(tensors) + 1
            tensors += [group.downs[i], group.ups[i]]
    ops.routed_linears(x, ids, tensors, [-1] * count, up_of, down_of, [routes[0], *routes[1:] * streams.count(False)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--agents", default="3,8,32")
    parser.add_argument("--tokens", default="1,8,128")
    parser.add_argument("--one-agent", action="store_true", help="all tokens of a step belong to one agent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpp_library.load()
    rank = options.rank
    for agents in map(int, options.agents.split(",")):
        layers = [layer(agents, rank) for _ in range(LAYERS)]
        routes = [agents, 0, 0, 0]
        for agent in range(agents):
            routes += [agent * rank, agent * rank, rank]
        mask = torch.zeros(agents + 1, agents * rank)
        for agent in range(agents):
            mask[agent + 1, agent * rank : (agent + 1) * rank] = 1
        for tokens in map(int, options.tokens.split(",")):
            ids = torch.randint(1, agents + 1, (1 if options.one_agent else tokens,)).expand(tokens)
            inputs = {size: torch.randn(tokens, size) for size, _ in GROUPS}

            def over_layers(work: Callable[..., None], *args: object, inputs: dict[int, Tensor] = inputs,
                            layers: list[list[Group]] = layers) -> None:  # fmt: skip
                for groups in layers:
                    for group, (size, _) in zip(groups, GROUPS, strict=True):
                        work(group, inputs[size], *args)

            works = {
                "base": partial(over_layers, plain, ids),
                "stacked": partial(over_layers, stacked, ids, mask),
                "routed_linears, dense": partial(over_layers, routed, ids, routes, False),
                "routed_linears, split": partial(over_layers, routed, ids, routes, True),
            }
            times = in_turn(works, REPEATS)
            bases = times.pop("base")
            base = statistics.median(bases)
            found = {
                name: statistics.median(spent / base for spent, base in zip(own, bases, strict=True))
                for name, own in times.items()
            }
            shown = ", ".join(f"{name} {ratio - 1:+.0%}" for name, ratio in found.items())
            print(f"{agents:3} agents, {tokens:4} tokens: base {base / LAYERS * 1e3:.2f} ms; {shown}")


if __name__ == "__main__":
    main()
