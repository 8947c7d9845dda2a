"""A llama and the six sharing schemes once more, written out token by token.

It checks `sharing_oracle` and shares nothing with it: no transformers, no PEFT, weights straight from the files, and a
cache that is a list of tokens, each with what is held of it. Everything is in float64, but for the rotary frequencies,
which the model defines in float32.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Linear:
    """A matrix and what each agent adds to it."""

    def __init__(self, weight: Tensor, lora: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        self.weight, self.lora = weight, lora

    def base(self, x: Tensor) -> Tensor:
        return self.weight @ x

    def column(self, x: Tensor, agent: str) -> Tensor:
        """x A; empty for an agent that does not adapt this matrix."""
        return self.lora[agent][0] @ x if agent in self.lora else x.new_zeros(0)

    def up(self, column: Tensor, agent: str) -> Tensor:
        """What an agent makes of a column."""
        if agent not in self.lora:
            return column.new_zeros(len(self.weight))
        _, b, scaling = self.lora[agent]
        return scaling * (b @ column)

    def whole(self, x: Tensor, agent: str) -> Tensor:
        return self.base(x) + self.up(self.column(x, agent), agent)


@dataclass
class Token:
    """One token; K and V by layer: base streams, columns by agent, whole K/V by owner.

    `unsettled`: the agent whose turn processed it, while the adapter-free pass is still due.
    """

    id: int
    base: dict[int, Pair] = field(default_factory=dict)
    columns: dict[str, dict[int, Pair]] = field(default_factory=dict)
    whole: dict[str, dict[int, Pair]] = field(default_factory=dict)
    unsettled: str | None = None


class LlamaByHand:
    """One trajectory of a tiny llama under one scheme."""

    def __init__(self, model_dir: Path, adapters: Mapping[str, Path], scheme: str) -> None:
        self.config = _json(model_dir / "config.json")
        self.weights = {name: w.double() for name, w in load_file(model_dir / "model.safetensors").items()}
        self.agents, self.scheme = tuple(adapters), scheme
        self.lora = {
            agent: (_json(path / "adapter_config.json"), load_file(path / "adapter_model.safetensors"))
            for agent, path in adapters.items()
        }
        self.layers = [
            {
                name: self._linear(f"model.layers.{i}.{part}.{name}")
                for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
                for name in (f"{short}_proj" for short in names)
            }
            for i in range(self.config["num_hidden_layers"])
        ]
        self.tokens: list[Token] = []

    def _linear(self, name: str) -> Linear:
        lora = {}
        for agent, (config, weights) in self.lora.items():
            a = weights.get(f"base_model.model.{name}.lora_A.weight")
            if a is not None:
                b = weights[f"base_model.model.{name}.lora_B.weight"]
                lora[agent] = (a.double(), b.double(), config["lora_alpha"] / config["r"])
        return Linear(self.weights[f"{name}.weight"], lora)

    def run(self, script: Sequence[tuple[Any, ...]]) -> list[list[float]]:
        """Log-probabilities of each turn's tokens, which the script gives."""
        results = []
        for step in script:
            if step[0] == "append":
                self.tokens += [Token(i) for i in step[1]]
            elif step[0] == "turn":
                results.append(self.turn(step[1], step[3]))
            elif step[0] == "truncate":
                del self.tokens[step[1] :]
            elif step[0] == "fork":
                self.tokens = copy.deepcopy(self.tokens)
        return results

    def turn(self, agent: str, forced: Sequence[int]) -> list[float]:
        self.settle()
        if self.scheme == "base_shared" and agent != "base":  # catch-up over tokens that others wrote
            for at, token in enumerate(self.tokens):
                if token.base and agent not in token.columns:
                    self.process(at, agent, columns=(agent,))
        logprobs = []
        for chosen in forced:
            logprobs.append(float(self.next_logits(agent).log_softmax(-1)[chosen]))
            self.tokens.append(Token(chosen))
        return logprobs

    def next_logits(self, agent: str) -> Tensor:
        """Processes every token that nobody (non_shared: not this agent) has processed; at least the last one."""
        owner = agent if self.scheme == "non_shared" else "all"
        logits = None
        for at, token in enumerate(self.tokens):
            if self.scheme in ("non_shared", "full_shared"):
                if owner not in token.whole:
                    logits = self.process(at, agent, owner=owner, whole=True)
            elif not token.base:
                columns = self.agents if self.scheme != "base_shared" else () if agent == "base" else (agent,)
                writer = "base" if self.scheme == "neutral_shared" else agent
                logits = self.process(at, writer, base=True, columns=columns)
                token.unsettled = agent if self.scheme == "rebase_shared" and agent != "base" else None
                if writer != agent:  # the agent's own row of the last token follows
                    logits = None
        if logits is None:  # nothing pending for this agent: the last token again, which writes nothing
            logits = self.process(len(self.tokens) - 1, agent, owner=owner)
        return logits

    def settle(self) -> None:
        """The adapter-free pass of rebase_shared: the acting agent's own columns stay."""
        for at, token in enumerate(self.tokens):
            if token.unsettled is not None:
                others = tuple(a for a in self.agents if a != token.unsettled)
                self.process(at, "base", base=True, columns=others)
                token.unsettled = None

    def process(
        self, at: int, agent: str, base: bool = False, columns: Sequence[str] = (), owner: str = "", whole: bool = False
    ) -> Tensor:
        """Logits after one token; it writes what is asked for and reads all else as it is held."""
        token = self.tokens[at]
        x = self.weights["model.embed_tokens.weight"][token.id]
        for number, layer in enumerate(self.layers):
            prefix = f"model.layers.{number}"
            h = self.norm(x, f"{prefix}.input_layernorm.weight")
            k, v = layer["k_proj"], layer["v_proj"]
            if base:
                token.base[number] = (k.base(h), v.base(h))
            for name in columns:
                token.columns.setdefault(name, {})[number] = (k.column(h, name), v.column(h, name))
            if whole:
                token.whole.setdefault(owner, {})[number] = (k.whole(h, agent), v.whole(h, agent))
            seen = [self.read(t, number, agent, owner) for t in self.tokens[: at + 1]]
            attended = self.attend(layer["q_proj"].whole(h, agent), at, seen)
            x = x + layer["o_proj"].whole(attended, agent)
            h = self.norm(x, f"{prefix}.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(layer["gate_proj"].whole(h, agent))
            x = x + layer["down_proj"].whole(gate * layer["up_proj"].whole(h, agent), agent)
        return self.weights["lm_head.weight"] @ self.norm(x, "model.norm.weight")

    def read(self, token: Token, number: int, agent: str, owner: str) -> Pair:
        """A token's key (before rotary) and value as an agent sees them."""
        if self.scheme in ("non_shared", "full_shared"):
            return token.whole[owner][number]
        k, v = token.base[number]
        if agent == "base":
            return k, v
        column_k, column_v = token.columns[agent][number]
        layer = self.layers[number]
        return k + layer["k_proj"].up(column_k, agent), v + layer["v_proj"].up(column_v, agent)

    def attend(self, query: Tensor, at: int, seen: Sequence[Pair]) -> Tensor:
        heads, kv_heads, dim = (self.config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q = self.rotate(query.view(heads, dim), at)
        keys = torch.stack([self.rotate(k.view(kv_heads, dim), i) for i, (k, _) in enumerate(seen)])
        values = torch.stack([v.view(kv_heads, dim) for _, v in seen])
        out = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            weights = (keys[:, kv] @ q[head] / dim**0.5).softmax(0)
            out.append(weights @ values[:, kv])
        return torch.cat(out)

    def rotate(self, x: Tensor, at: int) -> Tensor:
        half = x.shape[-1] // 2
        theta = self.config["rope_parameters"]["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
        angle = at * frequencies.double()
        first, second = x[:, :half], x[:, half:]
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)

    def norm(self, x: Tensor, weight: str) -> Tensor:
        return self.weights[weight] * x / (x.square().mean() + self.config["rms_norm_eps"]).sqrt()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
