"""Plain PEFT on a model directory, the reference of `verification.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Scored:
    """PEFT's scores of a continuation, one entry a token.

    Args:
        logprobs: log-probabilities of the continuation's tokens.
        behind: log-probability of the most likely token minus that of the continuation's; 0 where they are the same.
    """

    logprobs: list[float]
    behind: list[float]


class PeftReference:
    """The model with one adapter at a time, run by transformers and PEFT.

    When the agent changes, its adapter is loaded alone on a fresh base. PEFT can't hold adapters of all variants in one
    model, and a trained bias would change the base of the other agents.

    Args:
        dtype: name of the torch dtype in which the model runs.
    """

    def __init__(self, model: Path, adapters: Mapping[str, Path], dtype: str) -> None:
        self._path, self._adapters, self._dtype = model, adapters, getattr(torch, dtype)
        self._loaded: tuple[str, Any] | None = None

    def _acting(self, agent: str) -> Any:
        if self._loaded is None or self._loaded[0] != agent:
            from lragent.loading.checkpoint import read_base

            self._loaded = None  # frees the previous model before the next one is read
            model = read_base(self._path, self._dtype)
            if agent in self._adapters:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, self._adapters[agent], autocast_adapter_dtype=False)
            self._loaded = (agent, model.eval())
        return self._loaded[1]

    def score(self, agent: str, prompt: list[int], continuation: list[int]) -> Scored:
        """Scores a continuation in one forward pass; the agent `base` is the model without adapter."""
        ids = torch.tensor([prompt + continuation])
        with torch.no_grad():
            logits = self._acting(agent)(ids, use_cache=False).logits
        logprobs_TV = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        given_T = logprobs_TV.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        return Scored(given_T.tolist(), (logprobs_TV.max(-1).values - given_T).tolist())
