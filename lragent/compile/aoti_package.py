"""AOTInductor packages (.pt2): an exported program becomes machine code without weights, and is loaded again."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lragent.errors import InternalError, NoSpace
from lragent.graph.quiet_export import without_exporter_noise

# Takes the list of inputs, which it empties.
Run = Callable[[list[Any]], list[Tensor]]


def write_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles an exported program into a package at `path`.

    Raises:
        NoSpace: the directory of temporary files is full.
    """
    try:
        with without_exporter_noise():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.package_constants_in_so": False},
            )
    except (RuntimeError, OSError) as error:  # the C++ compiler's, as Inductor hands it on, and Python's
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        where = tempfile.gettempdir()
        raise NoSpace(
            f"no space left in {where} to compile in", "Make room, or let TMPDIR name another place."
        ) from error


def open_package(path: Path, weights: Mapping[str, Tensor], device: torch.device) -> Run:
    """Loads a package and lets it read `weights` where they are; nothing is copied, and the caller keeps them alive."""
    # A run that leaves events behind for other threads can't be captured in a CUDA graph.
    on_gpu = device.type == "cuda"
    runner = torch._inductor.aoti_load_package(
        str(path), run_single_threaded=on_gpu, device_index=device.index if on_gpu else -1
    )
    names = runner.get_constant_fqns()
    missing = [name for name in names if name not in weights]
    if missing:
        raise InternalError(f"package {path.name} wants weight {missing[0]}, which the artifact does not hold")
    if names:
        held = {name: weights[name].detach() for name in names}
        runner.load_constants(held, check_full_update=True, user_managed=True)
    # The runner's own call reads how inputs are nested from text each time, which takes longer than a small segment.
    run: Run = runner.loader.boxed_run
    return run
