"""Tuned adapters as PEFT directories: keys, dtypes and config of their parents, with facts of tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from lragent.errors import InternalError, RequestError
from lragent.loading.adapter_files import lora_places, read_weights
from lragent.loading.model import LoadedModel
from lragent.loading.tuned_metadata import Tuned, metadata_of
from lragent.program.dtypes import dtype_name
from lragent.runtime.schemes import scheme_named
from lragent.training.shared_model import SharedModel
from lragent.tuning.adapter_directory import write_adapter

_SIDE = {"A": 0, "B": 1}


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
    places = {key: (module, _SIDE[side]) for key, (module, side) in lora_places(tensors, base).items()}
    return Parent(agent, folder, tensors, places)


def round_as_saved(model: SharedModel, parents: Mapping[str, Parent]) -> None:
    """Rounds the model's parameters to the dtypes of the files, so that a report is one of what is saved."""
    for agent, parent in parents.items():
        matrices = trained_matrices(model, agent)
        for key, place in parent.places.items():
            if place in matrices:
                matrices[place].copy_(matrices[place].to(parent.tensors[key].dtype))


def save_adapters(
    loaded: LoadedModel, model: SharedModel, out: str | Path, sharing: str, steps: int = 0
) -> dict[str, Path]:
    """Writes the agents of a model that was trained, one PEFT directory each: `out/AGENT`.

    Keys, dtypes and configs are those of the adapters that were loaded. The metadata name the scheme, which
    `sharing="auto"` takes.

    Args:
        loaded: the model and the adapter directories that `model` was made from.
        sharing: the scheme of the rows that it was trained with.
        steps: optimizer steps, for the metadata.

    Returns:
        Directories by agent.

    Raises:
        RequestError: the scheme is unknown, or the adapters are not from directories.
        TuneError: a directory can't be written.
    """
    scheme_named(sharing)
    if set(loaded.adapter_folders) != set(model.agents):
        raise RequestError("the model's adapters are not from directories", "Load it with `load_directories`.")
    parents = {agent: read_parent(agent, folder, loaded.model) for agent, folder in loaded.adapter_folders.items()}
    digests = {agent.name: agent.digest for agent in loaded.agents}
    write_parents(parents, model, Path(out), sharing, digests, dtype_name(loaded.dtype), steps)
    return {agent: Path(out) / agent for agent in parents}


def write_parents(
    parents: Mapping[str, Parent],
    model: SharedModel,
    out: Path,
    sharing: str,
    digests: Mapping[str, str],
    dtype: str,
    steps: int,
) -> None:
    """Writes one directory an agent; `digests`, `dtype` and `steps` are for the metadata (`Tuned`).

    Raises:
        TuneError: a directory can't be written.
    """
    for agent, parent in parents.items():
        tuned = Tuned(sharing, agent, digests, dtype, steps, version("lragent"))
        save_adapter(parent, trained_matrices(model, agent), out / agent, tuned)


def trained_matrices(model: SharedModel, agent: str) -> dict[tuple[str, int], Tensor]:
    """The matrices of an agent that are trained: (module FQN, 0 for A or 1 for B) -> tensor."""
    return {
        (module, side): parameter.detach()
        for module, by_agent in model.pairs.items()
        for side, parameter in enumerate(by_agent.get(agent, ()))
        if parameter.requires_grad
    }


def save_adapter(parent: Parent, matrices: Mapping[tuple[str, int], Tensor], out: Path, tuned: Tuned) -> None:
    """Writes the parent's directory with other A and B, in the parent's dtypes.

    Args:
        matrices: see `trained_matrices`; the others stay as the parent's file has them.

    Raises:
        TuneError: it can't be written.
    """
    tensors = dict(parent.tensors)
    for key, place in parent.places.items():
        if place not in matrices:
            continue
        old, new = tensors[key], matrices[place]
        if old.shape != new.shape:
            raise InternalError(f"{key} of adapter {parent.agent} has shape {old.shape}, the tuned one {new.shape}")
        tensors[key] = new.to("cpu", old.dtype)
    write_adapter(parent.folder, tensors, out, metadata_of(tuned))
