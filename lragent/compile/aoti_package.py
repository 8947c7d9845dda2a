"""AOTInductor packages (.pt2): compiles exported programs to machine code without weights, and loads them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lragent.compat.torch import bind_weights, compile_package, load_package, run_function, weight_names
from lragent.errors import InternalError, NoSpace
from lragent.graph.quiet_export import without_exporter_noise

# Takes the list of inputs and empties it.
Run = Callable[[list[Any]], list[Tensor]]


def write_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles an exported program into a package at `path`.

    Raises:
        NoSpace: the directory of temporary files is full.
    """
    try:
        with without_exporter_noise():
            compile_package(program, path)
    except (RuntimeError, OSError) as error:  # raised by the C++ compiler (Inductor forwards it) or by Python
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        where = tempfile.gettempdir()
        raise NoSpace(
            f"no space left in {where} to compile in", "Free some space, or set TMPDIR to another directory."
        ) from error


def open_package(path: Path, weights: Mapping[str, Tensor], device: torch.device) -> Run:
    """Loads a package, which reads `weights` in place: nothing is copied, and the caller must keep them alive.

    Args:
        weights: weights by name, on `device`, contiguous.

    Raises:
        InternalError: the package reads a weight that `weights` lacks.
    """
    package = load_package(path, device)
    names = weight_names(package)
    missing = [name for name in names if name not in weights]
    if missing:
        raise InternalError(f"package {path.name} reads weight {missing[0]}, which the artifact does not contain")
    if names:
        bind_weights(package, {name: weights[name].detach() for name in names})
    return run_function(package)
