"""Writes tensors into a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODE = 0o644  # the library gives its files to their owner alone


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None) -> None:
    """Writes a file that everyone may read.

    Args:
        tensors: contiguous; none shares memory with another one.
        metadata: of the file, name -> text.

    Raises:
        OSError: it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(MODE)
