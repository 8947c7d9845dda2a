"""Tuned adapters as PEFT directories: keys, dtypes and config of their parents, with facts of tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lragent.errors import InternalError
from lragent.loading.adapter_files import lora_places, read_weights
from lragent.loading.tuned_metadata import Tuned, metadata_of
from lragent.training.shared_model import SharedModel
from lragent.tuning.adapter_directory import write_adapter

_SIDE = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}


@dataclass(frozen=True)
class Parent:
    """The adapter that tuning begins with.

    Args:
        tensors: all tensors of its file, by key.
        places: key of an A or B -> module FQN, and 0 for A or 1 for B.
    """

    agent: str
    folder: Path
    tensors: Mapping[str, Tensor]
    places: Mapping[str, tuple[str, int]]


def read_parent(agent: str, folder: Path, base: Any) -> Parent:
    """Reads an adapter directory.

    Args:
        base: the base model, with or without hooks.

    Raises:
        AdapterError: the weights are missing or damaged.
    """
    tensors = read_weights(agent, folder)
    places = {key: (module, _SIDE[part]) for key, (module, part) in lora_places(tensors, base).items()}
    return Parent(agent, folder, tensors, places)


def round_as_saved(model: SharedModel, parents: Mapping[str, Parent]) -> None:
    """Rounds the model's parameters to the dtypes of the files, so that a report is one of what is saved."""
    for agent, parent in parents.items():
        for key, (module, side) in parent.places.items():
            pair = model.pairs.get(module, {}).get(agent)
            if pair is not None:
                parameter = pair[side].data
                parameter.copy_(parameter.to(parent.tensors[key].dtype))


def save_adapter(parent: Parent, weights: Mapping[str, tuple[Tensor, Tensor]], out: Path, tuned: Tuned) -> None:
    """Writes the parent's directory with other A and B, in the parent's dtypes.

    Args:
        weights: module FQN -> A and B; modules that are left out keep theirs.

    Raises:
        TuneError: it can't be written.
    """
    tensors = dict(parent.tensors)
    for key, (module, side) in parent.places.items():
        if module not in weights:
            continue
        old, new = tensors[key], weights[module][side]
        if old.shape != new.shape:
            raise InternalError(f"{key} of adapter {parent.agent} has shape {old.shape}, the tuned one {new.shape}")
        tensors[key] = new.to("cpu", old.dtype)
    write_adapter(parent.folder, tensors, out, metadata_of(tuned))
