"""A tiny random attention model with LoRA on Q, K and V as a `Program` that uses the cache in every detail.

Legend: T = tokens, H = heads, D = head dim, P = tokens a page, r = rank. The adapters are strong, so that every sharing
scheme gives other logits, and everything is float64, so that rounding never decides a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.program.agent import Agent
from lragent.program.cache_schema import BaseStreams, CacheSchema, Layout, LowRankStream
from lragent.program.program import Program
from lragent.program.step import CacheTensors, StepInputs

AGENTS = ("plan", "act", "reflect")
LAYERS, HEADS, HEAD_DIM, DIM, VOCAB, POSITIONS = 2, 2, 4, 8, 40, 256
# plan and act share their A of K; reflect has no adapter on V.
RANKS_K, GROUP_K = (2, 2, 3), (0, 0, 2)
RANKS_V, GROUP_V = (2, 3, 0), (0, 1, 2)


@dataclass(frozen=True)
class ToyLayer:
    """Weights of one layer; `a_*` and `b_*` by agent id, entry 0 (base) is empty."""

    w_q: torch.Tensor  # [DIM, H * D]
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor  # [H * D, DIM]
    w_mlp: torch.Tensor  # [DIM, DIM]
    delta_q: tuple[torch.Tensor, ...]  # [DIM, H * D]
    a_k: tuple[torch.Tensor, ...]  # [r, DIM]
    b_k: tuple[torch.Tensor, ...]  # [r, H * D]
    a_v: tuple[torch.Tensor, ...]
    b_v: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ToyModel:
    embed: torch.Tensor  # [VOCAB, DIM]
    position: torch.Tensor  # [POSITIONS, DIM]
    head: torch.Tensor  # [DIM, VOCAB]
    layers: tuple[ToyLayer, ...]

    def inputs(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.embed[tokens] + self.position[positions]

    def after_attention(self, layer: ToyLayer, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(out @ layer.w_o)
        return x + torch.tanh(x @ layer.w_mlp)


def toy_model(seed: int = 0) -> ToyModel:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, std: float = 0.5) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    def adapters(ranks: tuple[int, ...], group: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        width = HEADS * HEAD_DIM
        own = [rand(rank, DIM) for rank in ranks]
        a = [torch.empty(0, DIM, dtype=torch.float64), *(own[first] for first in group)]
        b = [torch.empty(0, width, dtype=torch.float64), *(rand(rank, width) for rank in ranks)]
        return a, b

    layers = []
    for _ in range(LAYERS):
        a_k, b_k = adapters(RANKS_K, GROUP_K)
        a_v, b_v = adapters(RANKS_V, GROUP_V)
        width = HEADS * HEAD_DIM
        delta_q = (torch.zeros(DIM, width, dtype=torch.float64), *(rand(DIM, width, std=0.3) for _ in AGENTS))
        layers.append(
            ToyLayer(
                rand(DIM, width),
                rand(DIM, width),
                rand(DIM, width, std=1.0),
                rand(width, DIM),
                rand(DIM, DIM),
                delta_q,
                tuple(a_k),
                tuple(b_k),
                tuple(a_v),
                tuple(b_v),
            )
        )
    return ToyModel(rand(VOCAB, DIM, std=1.0), rand(POSITIONS, DIM), rand(DIM, VOCAB, std=1.0), tuple(layers))


def schema(layout: Layout) -> CacheSchema:
    low_rank = []
    for layer in range(LAYERS):
        low_rank.append(LowRankStream(f"layers.{layer}.k", RANKS_K, GROUP_K))
        low_rank.append(LowRankStream(f"layers.{layer}.v", RANKS_V, GROUP_V))
    return CacheSchema(
        layout,
        AGENTS,
        tuple(BaseStreams(layer, HEADS, HEAD_DIM, HEAD_DIM) for layer in range(LAYERS)),
        tuple(low_rank) if layout == "split" else (),
    )


def toy_program(layout: Layout, model: ToyModel | None = None) -> Program:
    toy = model or toy_model()

    def run(step: StepInputs, cache: CacheTensors) -> torch.Tensor:
        check_step(step, cache)
        x = toy.inputs(step.token_ids, step.positions)
        for index, layer in enumerate(toy.layers):
            q = x @ layer.w_q
            for agent in range(1, len(AGENTS) + 1):
                q = torch.where((step.agent_ids == agent)[:, None], q + x @ layer.delta_q[agent], q)
            k, v = x @ layer.w_k, x @ layer.w_v
            if layout == "dense":
                k = add_delta(x, k, layer.a_k, layer.b_k, step.agent_ids)
                v = add_delta(x, v, layer.a_v, layer.b_v, step.agent_ids)
            else:
                write_lr(x, layer.a_k, 2 * index, step, cache)
                write_lr(x, layer.a_v, 2 * index + 1, step, cache)
            page_size = cache.k_base[index].shape[2]
            pages, offsets = step.base_slots // page_size, step.base_slots % page_size
            cache.k_base[index][pages, :, offsets] = k.view(-1, HEADS, HEAD_DIM)
            cache.v_base[index][pages, :, offsets] = v.view(-1, HEADS, HEAD_DIM)
            x = toy.after_attention(layer, x, attention(q, layer, index, layout, step, cache))
        return (x[step.logits_rows] @ toy.head).float()

    agents = tuple(Agent(name, f"digest of {name}") for name in AGENTS)
    return Program(schema(layout), agents, POSITIONS, VOCAB, run, {"backend": "toy"})


def check_step(step: StepInputs, cache: CacheTensors) -> None:
    """The contract of program/step.py, and that no two tokens write one base slot that is kept.

    LR slots may repeat: two forks that catch up on a shared, half-filled page write the same columns.
    """
    page_size = cache.k_base[0].shape[2]
    assert step.lr_slots.shape == (len(AGENTS), len(step.token_ids))
    assert all(part.dtype == torch.int64 for part in step.tensors())
    kept = step.base_slots[step.base_slots >= page_size]
    assert len(kept.unique()) == len(kept)
    for s, length in enumerate(step.context_lens.tolist()):
        first, last = step.seq_starts[s].item(), step.seq_starts[s + 1].item()
        assert step.positions[first:last].tolist() == list(range(length - (last - first), length))
        assert len(step.agent_ids[first:last].unique()) == 1


def add_delta(x, out, a, b, agent_ids):  # type: ignore[no-untyped-def]
    for agent in range(1, len(AGENTS) + 1):
        out = torch.where((agent_ids == agent)[:, None], out + x @ a[agent].T @ b[agent], out)
    return out


def block(cache: CacheTensors, stream: int, agent: int) -> torch.Tensor:
    """An agent's column block, `[pages, P, r]`."""
    pages, _, page_size, _ = cache.k_base[0].shape
    offset, rank, _, _ = cache.lr_directories[stream][agent].tolist()
    return cache.low_rank[stream][offset : offset + pages * page_size * rank].view(pages, page_size, rank)


def write_lr(x: torch.Tensor, a: tuple[torch.Tensor, ...], stream: int, step: StepInputs, cache: CacheTensors) -> None:
    for agent in range(1, len(AGENTS) + 1):
        _, rank, _, writes = cache.lr_directories[stream][agent].tolist()
        if writes and rank:
            block(cache, stream, agent).view(-1, rank)[step.lr_slots[agent - 1]] = x @ a[agent].T


def attention(
    q: torch.Tensor, layer: ToyLayer, index: int, layout: Layout, step: StepInputs, cache: CacheTensors
) -> torch.Tensor:
    outs = []
    page_size = cache.k_base[index].shape[2]
    for s, length in enumerate(step.context_lens.tolist()):
        first, last = step.seq_starts[s].item(), step.seq_starts[s + 1].item()
        agent = int(step.agent_ids[first])
        pages = step.page_table[s, : -(-length // page_size)]
        assert bool((pages > 0).all())
        k = cache.k_base[index][pages].transpose(1, 2).reshape(-1, HEADS * HEAD_DIM)[:length]
        v = cache.v_base[index][pages].transpose(1, 2).reshape(-1, HEADS * HEAD_DIM)[:length]
        if layout == "split" and agent > 0:
            a_k = block(cache, 2 * index, agent)[pages].reshape(-1, RANKS_K[agent - 1])[:length]
            a_v = block(cache, 2 * index + 1, agent)[pages].flatten(0, 1)[:length]
            k = k + a_k @ layer.b_k[agent]
            v = v + a_v @ layer.b_v[agent]
        outs.append(attend(q[first:last], k, v, step.positions[first:last]))
    return torch.cat(outs)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Causal attention of queries at `positions` over keys and values from position 0 on, all `[., H * D]`."""
    q, k, v = (part.view(-1, HEADS, HEAD_DIM).transpose(0, 1) for part in (q, k, v))
    scores = q @ k.transpose(1, 2) / HEAD_DIM**0.5
    hidden = torch.arange(k.shape[1])[None] > positions[:, None]
    out = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v
    return out.transpose(0, 1).reshape(-1, HEADS * HEAD_DIM)
