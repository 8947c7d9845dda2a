"""Weight files of an artifact: every tensor written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lragent.files.checked_file import FileEntry, describe_file
from lragent.files.tensor_file import write_tensors

BASE_WEIGHTS = "weights/base.safetensors"
ADAPTER_FILES = "weights/adapters"  # prefix of the names of adapter weight files
ADAPTER_WEIGHTS = f"{ADAPTER_FILES}.safetensors"


def write_weights(
    directory: Path, tensors: Mapping[str, Tensor], adapter_names: frozenset[str]
) -> tuple[tuple[FileEntry, ...], dict[str, str]]:
    """Writes every tensor once: base weights into one file, adapter weights into another.

    Args:
        adapter_names: names of the tensors that come from adapters.

    Returns:
        The files, and aliases: name of a tied tensor -> name under which it is stored.
    """
    stored, aliases = stored_once(tensors)
    files = {
        BASE_WEIGHTS: {name: tensor for name, tensor in stored.items() if name not in adapter_names},
        ADAPTER_WEIGHTS: {name: tensor for name, tensor in stored.items() if name in adapter_names},
    }
    (directory / "weights").mkdir()
    entries = [save_tensors(directory, relative, contents) for relative, contents in files.items() if contents]
    return tuple(entries), aliases


def stored_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns each tensor under one of its names, and the other names -> that name."""
    names: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity in names and tensor.numel() > 0:
            aliases[name] = names[identity]
            continue
        names[identity] = name
        stored[name] = tensor.detach().contiguous()
    return stored, aliases


def save_tensors(
    directory: Path, relative: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> FileEntry:
    """Writes a safetensors file into an artifact.

    Args:
        metadata: of the file, name -> text.

    Raises:
        OSError: it can't be written.
    """
    write_tensors(tensors, directory / relative, metadata)
    return describe_file(directory, relative)
