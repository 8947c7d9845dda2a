"""Projections that feed K or V, taken apart into base output and columns x A of every agent, and remembered by token.

A pass runs the model over the whole sequence from token 0. Rows before the pass's start (and, where the scheme says so,
later ones) take their K/V from what was remembered; all of the model's own code (norms, rotary, masks, windows, sinks)
then runs on them as it is. What rows before the start give further up is never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PretrainedConfig

CAPACITY = 256


@dataclass
class Memory:
    """What is held of one projection: base and full outputs `[tokens, out]`, columns per agent `[tokens, r]`."""

    base: Tensor
    full: Tensor
    columns: dict[str, Tensor]
    later: list[Memory] = field(default_factory=list)  # of further calls of the projection in one pass

    def copy(self) -> Memory:
        return Memory(
            self.base.clone(),
            self.full.clone(),
            {a: c.clone() for a, c in self.columns.items()},
            [memory.copy() for memory in self.later],
        )


@dataclass(frozen=True)
class Pass:
    """Tokens `[start, end)` run by an agent (None: no adapter).

    `full`: K/V are remembered whole (dense); otherwise base and columns apart. `old_base` / `old_columns`: rows of the
    pass itself read what is remembered instead of what they compute.
    """

    start: int
    end: int
    agent: str | None
    full: bool = False
    old_base: bool = False
    old_columns: bool = False


class KvProjection(nn.Module):
    """In place of a projection (with or without LoRA) that feeds K or V; `kv` marks the outputs that do."""

    def __init__(self, inner: nn.Module, kv: Tensor) -> None:
        super().__init__()
        self.inner, self.kv = inner, kv
        self.memory: Memory | None = None
        self.now: Pass | None = None
        self.computed: list[Memory] = []  # by call of the pass

    @property
    def lora(self) -> LoraLinear | None:
        return self.inner if isinstance(self.inner, LoraLinear) else None

    def empty_memory(self, dtype: torch.dtype) -> Memory:
        ranks = {a: m.out_features for a, m in self.lora.lora_A.items()} if self.lora is not None else {}
        out = len(self.kv)
        return Memory(
            torch.zeros(CAPACITY, out, dtype=dtype),
            torch.zeros(CAPACITY, out, dtype=dtype),
            {a: torch.zeros(CAPACITY, r, dtype=dtype) for a, r in ranks.items()},
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:  # [1, 1, T, in]
            return self.forward(x[0])[None]
        now = self.now
        assert now is not None and self.memory is not None and x.shape[1] == now.end
        memory = self._held(len(self.computed), self.memory)
        base = (self.lora.base_layer if self.lora is not None else self.inner)(x)[0]
        columns = {a: m(x)[0] for a, m in self.lora.lora_A.items()} if self.lora is not None else {}
        own = self._adapted(base, columns, now.agent)
        self.computed.append(Memory(base, own, columns))
        if now.full:
            old = torch.arange(now.end) < now.start
            held = torch.where(old[:, None], memory.full[: now.end], own)
        else:
            old_base = torch.arange(now.end) < (now.end if now.old_base else now.start)
            old_columns = torch.arange(now.end) < (now.end if now.old_columns else now.start)
            merged = {a: torch.where(old_columns[:, None], memory.columns[a][: now.end], c) for a, c in columns.items()}
            kept = torch.where(old_base[:, None], memory.base[: now.end], base)
            held = self._adapted(kept, merged, now.agent)
        return torch.where(self.kv, held, own)[None]

    def _held(self, call: int, memory: Memory) -> Memory:
        """Memory of a call of the pass: a layer that the model runs several times has one for each time."""
        if call == 0:
            return memory
        while len(memory.later) < call:
            memory.later.append(self.empty_memory(memory.base.dtype))
        return memory.later[call - 1]

    def _adapted(self, base: Tensor, columns: Mapping[str, Tensor], agent: str | None) -> Tensor:
        """What the agent makes of base outputs and its columns; a DoRA scales both, but not the base's bias."""
        if self.lora is None or agent not in columns:
            return base
        delta = self.lora.lora_B[agent](columns[agent]) * self.lora.scaling[agent]
        if not self.lora.use_dora[agent]:
            return base + delta
        layer = self.lora.base_layer
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        update = self.lora.lora_B[agent].weight @ self.lora.lora_A[agent].weight * self.lora.scaling[agent]
        gain = self.lora.lora_magnitude_vector[agent].weight / (weight + update).norm(dim=1)
        bias = layer.bias if layer.bias is not None else torch.zeros_like(gain)
        return bias + gain * (base - bias + delta)

    def start(self, now: Pass, memory: Memory) -> None:
        """Begins a pass."""
        self.now, self.memory, self.computed = now, memory, []

    def remember(self, base: bool, agents: tuple[str, ...]) -> None:
        """Keeps what the last pass computed: base (and whole) outputs, and columns of some agents."""
        assert self.now is not None and self.memory is not None and self.computed
        rows = slice(self.now.start, self.now.end)
        for call, computed in enumerate(self.computed):
            memory = self._held(call, self.memory)
            if base:
                memory.base[rows] = computed.base[rows]
                memory.full[rows] = computed.full[rows]
            for agent in agents:
                if agent in computed.columns:
                    memory.columns[agent][rows] = computed.columns[agent][rows]


def kv_outputs(name: str, config: PretrainedConfig) -> Tensor | None:
    """Which outputs of a projection feed K or V (bool per output); None for projections that feed neither."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if name in ("k_proj", "v_proj"):
        return torch.ones(kv_heads * dim, dtype=torch.bool)
    if name == "qkv_proj":  # queries, keys, values, one after the other
        return torch.arange((heads + 2 * kv_heads) * dim) >= heads * dim
    if name == "c_attn":
        return torch.arange(3 * config.hidden_size) >= config.hidden_size
    if name == "query_key_value":  # query, key and value of each head together
        return torch.arange(3 * heads * dim) % (3 * dim) >= dim
    return None
