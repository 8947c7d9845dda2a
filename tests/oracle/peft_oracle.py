"""What PEFT itself computes, in any dtype, without a cache: the whole sequence is run again for every question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models import quiet

BASE = "base"


def load_peft(model_dir: Path, adapters: Mapping[str, Path], dtype: torch.dtype) -> Any:
    """The model with all adapters, eager attention, in one dtype."""
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        model: Any = None
        for name, path in adapters.items():
            if model is None:
                model = PeftModel.from_pretrained(base, str(path), adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(str(path), adapter_name=name, autocast_adapter_dtype=False)
    return model.to(dtype).eval()


def logits(model: Any, ids: list[int], agent: str) -> Tensor:
    """Logits of every position, `[len(ids), vocab]`, in the model's dtype."""
    with torch.no_grad():
        if agent == BASE:
            with model.disable_adapter():
                return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        model.set_adapter(agent)
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def logprobs(model: Any, ids: list[int], agent: str) -> Tensor:
    """log_softmax of `logits`, computed in float64."""
    return logits(model, ids, agent).double().log_softmax(-1)
