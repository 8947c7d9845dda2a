"""Converts random models of several depths, compiled whole and by layer: seconds per stage, loading, decode step.

    python -m benchmarks.convert_times [--layers 2,8,30,60] [--sequences 1,8]
    python -m benchmarks.convert_times --model DIR --adapters plan=DIR,action=DIR --dtype bfloat16 --context 512

All times are CPU seconds, those of the C++ compiler included. Inductor's cache is empty at the start of each run. The
random models are so narrow (64 channels) that the overhead of a unit is most of a step. Steps of the two units are
timed in turn, one thread, median of 31. Both read one file of weights, because the place of a file in memory changes
times by some percent.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import lragent
from benchmarks.step import runner, step_inputs
from benchmarks.timing import in_turn
from lragent.artifact.build import BuildOptions, write
from lragent.artifact.tokenizer import artifact_tokenizer
from lragent.compat.torch import empty_inductor_cache
from lragent.compile.compile import UNITS
from lragent.loading.model import load_directories
from lragent.loading.stages import Stages
from lragent.passes.pipeline import rewrite
from lragent.program.program import Program
from tests.models import write_model

SHARING, REPEATS = "base_lr_shared", 31


class Clock:
    """CPU seconds per stage, of this process and of the children it waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def __call__(self, stage: str) -> None:
        times = os.times()
        now = times.user + times.system + times.children_user + times.children_system
        if self._stage:
            self.seconds[self._stage] = now - self._since
        self._stage, self._since = stage, now


def convert(model_dir: Path, adapters: Mapping[str, Path], dtype: str, out: Path, unit: str) -> dict[str, float]:
    clock = Clock()
    stages = Stages(clock)
    with empty_inductor_cache():
        loaded = stages.run("load", lambda: load_directories(model_dir, adapters, dtype))
        rewritten = rewrite(loaded, ("split",), stages)
        options = BuildOptions(compiled=("split",), unit=unit)
        write(loaded, rewritten, artifact_tokenizer(loaded), out, options=options, stages=stages)
    clock("")
    return clock.seconds


def step_seconds(programs: Mapping[str, Program], sequences: int, context: int) -> dict[str, float]:
    """Median CPU seconds of a decode step of each program, taken in turn."""
    runs = {
        unit: runner(program, SHARING, step_inputs(program, sequences, 1, context))
        for unit, program in programs.items()
    }
    return {unit: statistics.median(times) for unit, times in in_turn(runs, REPEATS).items()}


def compare(name: str, model_dir: Path, adapters: Mapping[str, Path], options: argparse.Namespace) -> None:
    """Converts one model in both units and prints the times."""
    with tempfile.TemporaryDirectory() as scratch:
        outs = {unit: Path(scratch) / f"{unit}.lragent" for unit in UNITS}
        for unit, out in outs.items():
            seconds = convert(model_dir, adapters, options.dtype, out, unit)
            stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())
            print(f"{name}, {unit:5}: {sum(seconds.values()):6.1f} s ({stages})", flush=True)
        programs: dict[str, Program] = {}
        for unit, out in outs.items():
            if unit != UNITS[0]:
                shutil.rmtree(out / "weights")
                (out / "weights").symlink_to(outs[UNITS[0]] / "weights")
            started = time.process_time()
            programs[unit] = lragent.load(out, sharing=SHARING, kv_memory="16MiB").program
            print(f"{name}, {unit:5}: loading {time.process_time() - started:.2f} s", flush=True)
        for sequences in map(int, options.sequences.split(",")):
            found = step_seconds(programs, sequences, options.context)
            shown = ", ".join(f"{unit} {spent * 1e3:.2f} ms" for unit, spent in found.items())
            print(f"{name}, decode of {sequences}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,8,30,60")
    parser.add_argument("--sequences", default="1,8")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--model", type=Path, help="convert this model instead of random ones")
    parser.add_argument("--adapters", default="", help="adapters of --model: NAME=DIR,...")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model is not None:
        named = dict(entry.split("=", 1) for entry in options.adapters.split(",") if entry)
        compare(options.model.name, options.model, {name: Path(folder) for name, folder in named.items()}, options)
        return
    for layers in map(int, options.layers.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            written = write_model(Path(scratch), "llama", targets="qv", layers=layers)
            compare(f"{layers:2} layers", written.model_dir, written.adapters, options)


if __name__ == "__main__":
    main()
