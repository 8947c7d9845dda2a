"""Checkpoints of a round: one file, replaced in one step, from which the round goes on to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lragent.errors import TuneError
from lragent.files.replace_file import replacing


@dataclass
class Progress:
    """The place of a round.

    Args:
        step: optimizer steps done.
        steps: steps planned; the learning rate follows from both.
        seconds: time of the steps so far; seconds_allowed: after which the round ends.
        kept_step: step of the weights that are kept; 0: those that the round began with; -1 before the first
            evaluation.
        best: held-out loss of the best evaluation, as each held-out example's part of it.
        worse: last evaluations that were worse than the best one.
        losses: (step, loss) of every step; held_out: (step, value) of every evaluation.
        stopped: reason for which the round ended before its last step; "" if it did not.
    """

    steps: int
    seconds_allowed: float
    step: int = 0
    seconds: float = 0.0
    kept_step: int = -1
    best: list[float] = field(default_factory=list)
    worse: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""

    @property
    def ended(self) -> bool:
        return self.step >= self.steps or bool(self.stopped)


@dataclass
class RoundState:
    """All that changes in a round.

    Args:
        parameters: by name; trained ones only.
        kept: copies of the parameters that are kept; empty before the first evaluation.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: AdamW
    progress: Progress
    kept: dict[str, Tensor] = field(default_factory=dict)

    def keep(self) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def use_kept(self) -> None:
        """Gives the parameters the values that were kept, if any were."""
        for name, value in self.kept.items():
            self.parameters[name].data.copy_(value)


def save_checkpoint(path: Path, state: RoundState, facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint.

    Args:
        facts: JSON; all that must be the same when the round goes on.

    Raises:
        TuneError: it can't be written; the former one stays.
    """
    from safetensors.torch import save

    tensors = {f"now/{name}": parameter.detach() for name, parameter in state.parameters.items()}
    tensors |= {f"kept/{name}": value for name, value in state.kept.items()}
    for name, parameter in state.parameters.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam/{key}/{name}"] = value
    entries = {"facts": facts, "progress": dataclasses.asdict(state.progress)}
    metadata = {name: json.dumps(value) for name, value in entries.items()}
    try:
        with replacing(path) as file:
            file.write(save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, metadata))
    except OSError as error:
        raise TuneError(
            f"{path} can't be written: {error.strerror}", "The former checkpoint stays. Make room, then use --resume."
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    progress: Progress

    def put_into(self, parameters: Mapping[str, nn.Parameter], optimizer: AdamW) -> RoundState:
        """The state of the round; parameters and optimizer are changed."""
        state = RoundState(dict(parameters), optimizer, self.progress)
        for label, tensor in self.tensors.items():
            kind, _, name = label.partition("/")
            if kind == "now":
                state.parameters[name].data.copy_(tensor)
            elif kind == "kept":
                state.kept[name] = tensor.to(state.parameters[name].device)
            else:
                key, _, name = name.partition("/")
                parameter = state.parameters[name]
                held = tensor if key == "step" else tensor.to(parameter.device)
                optimizer.state.setdefault(parameter, {})[key] = held
        return state


def read_checkpoint(path: Path) -> Checkpoint | None:
    """None if there is none.

    Raises:
        TuneError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        progress = json.loads(metadata["progress"])
        for name in ("losses", "held_out"):
            progress[name] = [(step, value) for step, value in progress[name]]
        return Checkpoint(tensors, json.loads(metadata["facts"]), Progress(**progress))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TuneError(f"{path} is damaged: {error}", "Start anew with --overwrite.") from error


def all_finite(parameters: Mapping[str, nn.Parameter]) -> bool:
    """True if no parameter holds an infinite value or NaN."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values())
