"""What PEFT itself computes, in any dtype, without a cache: the whole sequence is run again for every question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models import quiet
from tests.oracle.precision import computing_in

BASE = "base"


def load_plain(model_dir: Path, dtype: torch.dtype) -> Any:
    """The model as it is, without PEFT; eager attention, in one dtype."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    return model.to(dtype).eval()


def load_peft(model_dir: Path, adapters: Mapping[str, Path], dtype: torch.dtype) -> Any:
    """The model with all adapters, eager attention, in one dtype."""
    first, *others = adapters.items()
    with quiet():
        model: Any = PeftModel.from_pretrained(
            load_plain(model_dir, torch.float32), str(first[1]), adapter_name=first[0], autocast_adapter_dtype=False
        )
        for name, path in others:
            model.load_adapter(str(path), adapter_name=name, autocast_adapter_dtype=False)
    return model.to(dtype).eval()


def logits(model: Any, ids: list[int], agent: str) -> Tensor:
    """Logits of every position, `[len(ids), vocab]`, in the model's dtype."""
    with torch.no_grad(), computing_in(model.dtype):
        if agent == BASE and hasattr(model, "disable_adapter"):  # a plain model has nothing to disable
            with model.disable_adapter():
                return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        if agent != BASE:
            model.set_adapter(agent)
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def logprobs(model: Any, ids: list[int], agent: str) -> Tensor:
    """log_softmax of `logits`, computed in float64."""
    return logits(model, ids, agent).double().log_softmax(-1)


def generate(
    model: Any, ids: list[int], agent: str, tokens: int, forced: Sequence[int] | None = None
) -> tuple[list[int], list[float]]:
    """Tokens that the agent adds, greedily or as forced, and their log-probabilities."""
    chosen: list[int] = []
    found: list[float] = []
    for i in range(tokens):
        last = logprobs(model, ids + chosen, agent)[-1]
        chosen.append(int(last.argmax()) if forced is None else int(forced[i]))
        found.append(float(last[chosen[-1]]))
    return chosen, found
