"""A causal LM of our own, small and open: tests change one line of its attention to make a pass match or refuse.

`TinyLM(key_path=..., value_path=...)` takes what happens between the K (V) projection and attention as a function
`(k [1, T, H, D], positions [1, T], module) -> [1, T, H, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HIDDEN, HEADS, KV_HEADS, DIM, VOCAB, POSITIONS = 32, 4, 2, 8, 64, 96

Path = Callable[[Tensor, Tensor, nn.Module], Tensor]


class TinyConfig(PretrainedConfig):
    """Sizes only; the paths are given to the model."""

    model_type = "tiny_lm"

    def __init__(self, layers: int = 2, **kwargs: Any) -> None:
        self.vocab_size = VOCAB
        self.hidden_size = HIDDEN
        self.num_hidden_layers = layers
        self.max_position_embeddings = POSITIONS
        super().__init__(**kwargs)


def keep(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return x


def rotate(x_1THD: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    """Rotary embedding, half layout."""
    frequencies = 100.0 ** (-torch.arange(0, DIM, 2).float() / DIM)
    angles = positions[..., None].float() * frequencies
    cos, sin = torch.cat([angles.cos()] * 2, -1)[:, :, None], torch.cat([angles.sin()] * 2, -1)[:, :, None]
    left, right = x_1THD.chunk(2, -1)
    return x_1THD * cos + torch.cat([-right, left], -1) * sin


def rms_norm(x_1THD: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    """RMSNorm over each head."""
    scale = torch.rsqrt(x_1THD.pow(2).mean(-1, keepdim=True) + 1e-6)
    return module.key_norm * (x_1THD * scale)


def eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=module.is_causal, enable_gqa=True, scale=scaling
    )
    return out.transpose(1, 2), None


class TinyAttention(nn.Module):
    def __init__(self, config: TinyConfig, index: int, key_path: Path, value_path: Path) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, index, True
        self.num_key_value_groups = HEADS // KV_HEADS
        self.key_path, self.value_path = key_path, value_path
        self.alpha = nn.Linear(HIDDEN, HEADS * DIM)
        self.beta = nn.Linear(HIDDEN, KV_HEADS * DIM)
        self.gamma = nn.Linear(HIDDEN, KV_HEADS * DIM)
        self.delta = nn.Linear(HEADS * DIM, HIDDEN)
        self.key_norm = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = rotate(self.alpha(x).unflatten(-1, (HEADS, DIM)), positions, self)
        k = self.key_path(self.beta(x).unflatten(-1, (KV_HEADS, DIM)), positions, self)
        v = self.value_path(self.gamma(x).unflatten(-1, (KV_HEADS, DIM)), positions, self)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        out, _ = attend(self, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, scaling=DIM**-0.5)
        return self.delta(out.flatten(2))


class TinyLM(PreTrainedModel):
    config_class = TinyConfig
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config: TinyConfig, key_path: Path = rotate, value_path: Path = keep) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(
            TinyAttention(config, i, key_path, value_path) for i in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x, position_ids)
        return CausalLMOutput(logits=self.head(x))


@dataclass
class Tiny:
    """A tiny PEFT model and its parts."""

    key_path: Path = rotate
    value_path: Path = keep
    targets: tuple[str, ...] = ("alpha", "beta", "gamma")
    ranks: dict[str, int] = field(default_factory=lambda: {"plan": 2, "action": 4})
    shared_a: bool = False
    use_dora: bool = False
    layers: int = 2

    def build(self) -> Any:
        """The model with adapters of strong random weights, seeded."""
        torch.manual_seed(0)
        base = TinyLM(TinyConfig(self.layers), self.key_path, self.value_path).eval()
        model: Any = base
        for name, rank in self.ranks.items():
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(self.targets), use_dora=self.use_dora)
            if model is base:
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        first = next(iter(self.ranks), None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        if self.shared_a:
            parameters = dict(model.named_parameters())
            for name, parameter in parameters.items():
                if "lora_A" in name:
                    adapter = name.split(".")[-2]
                    parameter.data.copy_(parameters[name.replace(f".{adapter}.", f".{first}.")].data)
        return model.eval()
