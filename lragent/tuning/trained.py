"""Chooses the parameters that are trained."""

from __future__ import annotations

from torch import nn

from lragent.errors import TuneError
from lragent.loading.adapter_hook import Hook
from lragent.loading.model import LoadedModel
from lragent.training.shared_model import SharedModel
from lragent.tuning.options import Trained


def frozen_modules(loaded: LoadedModel, model: SharedModel) -> dict[str, str]:
    """Adapted modules that are not trained, each with its reason.

    The teacher's logits come from its hidden states through the LM head, so an adapter on the head stays. A module of
    which more than A and B follows from training (DoRA's gain) stays too.
    """
    frozen = {fqn: "its adapter is more than A and B (DoRA, or saved rows)" for fqn in model.fixed}
    head = loaded.model.get_output_embeddings()
    if isinstance(head, Hook):
        frozen[head.fqn] = "it is the LM head"
    return frozen


def trained_parameters(model: SharedModel, train: Trained, frozen: dict[str, str]) -> dict[str, nn.Parameter]:
    """Parameters by name, in order; all others are switched off.

    Raises:
        TuneError: nothing is left.
    """
    wanted = {
        id(parameter)
        for module, by_agent in model.pairs.items()
        if module not in frozen
        for a, b in by_agent.values()
        for side, parameter in (("a", a), ("b", b))
        if train in ("both", side)
    }
    found = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        if parameter.requires_grad:
            found[name] = parameter
    if not found:
        reasons = "; ".join(f"{module}: {reason}" for module, reason in frozen.items())
        raise TuneError(f"no matrix of these adapters can be trained: {reasons}", "Give LoRA adapters.")
    return found
