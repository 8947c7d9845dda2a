"""Runs a compiled package in a child process first. If the package crashes, only the child ends.

    python -m lragent.artifact.package_probe ARTIFACT LAYOUT PACKAGE ATTENTION GRAPH KV_DTYPE DEVICE

The child maps the artifact's weights, loads the package and runs one small step on zeros.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from lragent.artifact.directory import open_artifact
from lragent.compile.compile import load_compiled
from lragent.compile.devices import device_named, moved
from lragent.compile.export import example_cache, example_step
from lragent.errors import MOST_SHOWN, ArtifactError
from lragent.kernels.dispatch import resolve
from lragent.kernels.implementations import GRAPHS
from lragent.program.dtypes import dtype_named
from lragent.program.step import StepKind

SECONDS = 600  # time limit of the child, which loads the weights and runs one step
# Sequences and tokens of each; `example_cache` has pages for two sequences.
_SIZES: dict[StepKind, tuple[int, int]] = {"any": (2, 3), "decode": (2, 1), "prefill": (1, 3)}


@dataclass(frozen=True)
class Probe:
    """A package to run. All fields are text, because they are the child's arguments.

    Args:
        package: path of the package, or of a plan; it may lie outside the artifact.
        graph: name of the graph from which it was compiled (`lragent.kernels.dispatch.graphs`).
    """

    artifact: str
    layout: str
    package: str
    attention: str
    graph: str
    kv_dtype: str
    device: str


def require_runs(probe: Probe) -> None:
    """Runs a package in a child process. The child needs room on the device for a second copy of the weights.

    Raises:
        ArtifactError: the child crashed, failed or hung; names package, device, signal or exit code, and the child's
            last output.
    """
    command = [sys.executable, "-m", __name__, *astuple(probe)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(probe, f"did not end within {SECONDS} s", "") from error
    if done.returncode < 0:
        raise _failed(probe, f"was ended by {_signal_name(-done.returncode)}", done.stderr)
    if done.returncode > 0:
        raise _failed(probe, f"ended with exit code {done.returncode}", done.stderr)


def run(probe: Probe) -> None:
    """Loads a package and runs one step in this process."""
    resolve(probe.attention, probe.device)
    device, artifact = device_named(probe.device), open_artifact(probe.artifact)
    schema = artifact.manifest.layouts[probe.layout].schema
    call = load_compiled(Path(probe.package), schema, moved(artifact.weights(), device), device)
    step = example_step(len(schema.agents), *_SIZES[GRAPHS[probe.graph].steps])
    cache = example_cache(schema, dtype_named(probe.kv_dtype))
    call(*(tensor.to(device) for tensor in (*step.tensors(), *cache.tensors())))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _failed(probe: Probe, what: str, stderr: str) -> ArtifactError:
    last = " ".join(stderr.split())
    shown = f": {last if len(last) <= MOST_SHOWN else '...' + last[3 - MOST_SHOWN :]}" if last else ""
    return ArtifactError(
        f"the compiled package {probe.package} can't be used on {probe.device}: a process that tried it {what}{shown}",
        'Use backend="eager" (--backend eager), which runs no compiled package.',
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    run(Probe(*sys.argv[1:]))
