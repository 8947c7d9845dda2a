"""AdamW with warm-up and a cosine; the rate of a step follows from its number alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW

WARM_UP = 8  # steps
BETAS = (0.9, 0.98)
MOST_NORM = 1.0  # of the gradient


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> AdamW:
    """The optimizer of the trained parameters; adapters are small, so nothing decays."""
    return AdamW([p for p in parameters if p.requires_grad], lr=rate, betas=BETAS, weight_decay=0.0)


def set_rate(optimizer: AdamW, peak: float, step: int, steps: int) -> None:
    """Sets the learning rate of step `step`, counted from 0, of `steps`."""
    rate = peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(optimizer: AdamW) -> float:
    """Scales the gradient down to a norm of at most `MOST_NORM`; returns the norm that it had."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return float(torch.nn.utils.clip_grad_norm_(parameters, MOST_NORM))
