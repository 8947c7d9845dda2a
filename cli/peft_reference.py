"""Plain PEFT on a model directory: what `lragent verify` compares an artifact with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Scored:
    """PEFT's view of a continuation, one entry a token.

    Args:
        logprobs: of the tokens given.
        behind: by how much the most likely token is ahead of the one given; 0 where greedy decoding agrees.
    """

    logprobs: list[float]
    behind: list[float]


class PeftReference:
    """The model with its adapters, run token by token as transformers and PEFT do it.

    Args:
        dtype: name of a torch dtype, that of the artifact.
    """

    def __init__(self, model_dir: Path, adapters: Mapping[str, Path], dtype: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        # PEFT's names become module names, which can't hold dots.
        self._names = {agent: f"adapter{index}" for index, agent in enumerate(adapters)}
        peft_model: Any = None
        for agent, path in adapters.items():
            name = self._names[agent]
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, path, adapter_name=name, autocast_adapter_dtype=False)
            else:
                peft_model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
        self._model = peft_model.eval()

    def score(self, agent: str, prompt: list[int], continuation: list[int]) -> Scored:
        """Log-probabilities of a continuation by an agent; `base` is the model without adapter."""
        ids = torch.tensor([prompt + continuation])
        with torch.no_grad():
            if agent in self._names:
                self._model.set_adapter(self._names[agent])
                logits = self._model(ids, use_cache=False).logits
            else:
                with self._model.disable_adapter():
                    logits = self._model(ids, use_cache=False).logits
        logprobs_TV = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        given_T = logprobs_TV.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        return Scored(given_T.tolist(), (logprobs_TV.max(-1).values - given_T).tolist())
