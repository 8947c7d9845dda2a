"""Facts of the runs that wrote trajectory files, from the run files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.errors import TaskFileError
from lragent.rollouts.run_file import read_run_file, run_file_of


@dataclass(frozen=True)
class SourceRun:
    """The newest run of a file.

    Args:
        dtype: of the weights; sharing: the scheme.
        vocab_size: of the model; 0 if it is not known.
    """

    file: Path
    dtype: str
    sharing: str
    vocab_size: int


def source_runs(files: Sequence[Path]) -> tuple[SourceRun, ...]:
    """The runs of files that have a run file; gold has none.

    Raises:
        TaskFileError: a run file is damaged, or two runs had different dtypes.
    """
    runs = []
    for file in files:
        found = read_run_file(run_file_of(file))
        if found is not None:
            parts: dict[str, Any] = dict(found.entries[-1].run.parts)
            artifact = parts.get("artifact")
            vocab_size = artifact.get("vocab_size", 0) if isinstance(artifact, dict) else 0
            runs.append(SourceRun(file, str(parts.get("dtype", "")), str(parts.get("sharing", "")), vocab_size))
    dtypes = {run.dtype: run.file for run in runs}
    if len(dtypes) > 1:
        shown = ", ".join(f"{file} in {dtype}" for dtype, file in dtypes.items())
        raise TaskFileError(f"the trajectories were rolled out in different dtypes: {shown}", "Tune one set at a time.")
    return tuple(runs)


def run_dtype(runs: Sequence[SourceRun], wanted: str) -> str:
    """The dtype to load the model in: the one that is asked for, else that of the runs, else "auto"."""
    if wanted != "auto":
        return wanted
    return next((run.dtype for run in runs if run.dtype), "auto")


def require_same_vocabulary(runs: Sequence[SourceRun], vocab_size: int) -> None:
    """Raises TaskFileError for a run of a model with another vocabulary."""
    for run in runs:
        if run.vocab_size not in (0, vocab_size):
            raise TaskFileError(
                f"{run.file} was rolled out with a vocabulary of {run.vocab_size} tokens, the model has {vocab_size}",
                "Give the model that rolled it out.",
            )
