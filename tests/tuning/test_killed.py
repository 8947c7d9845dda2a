"""A tuning run that is killed with SIGKILL, and resumed, ends with the weights of a run that nobody killed."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lragent
from lragent.tuning.checkpoint import read_checkpoint
from lragent.tuning.options import TuneOptions
from lragent.tuning.report import TuneReport
from tests.tuning.conftest import RolledOut

STEPS = 16
OPTIONS = TuneOptions(
    arithmetic="float32", steps=STEPS, batch_tokens=120, held_out=0.2, evaluations=4, patience=0, checkpoint_seconds=0
)
CHECKPOINT = Path(".tuning") / "round-1.safetensors"

# Says each step; with a number, it dies as so many checkpoints are written, when the last one has not yet its name.
RUN = f"""
import json, os, signal, sys
import lragent
from lragent.tuning.options import TuneOptions
model, adapters, results, out, threads, options, dies_at = json.loads(sys.argv[1])
written = 0
def die_in_time(event, arguments):
    global written
    if event == "os.rename" and str(arguments[1]).endswith("{CHECKPOINT}"):
        written += 1
        if written == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die_in_time)
def say(step):
    print(step.step, flush=True)
lragent.tune(model, adapters, results, out, options=TuneOptions(**options), threads=threads, on_step=say)
"""


def tune(given: RolledOut, out: Path, existing: str = "refuse") -> TuneReport:
    threads = torch.get_num_threads()
    return lragent.tune(
        given.model_dir, given.adapters, given.results, out, options=OPTIONS, existing=existing, threads=threads
    )


@pytest.fixture(scope="module")
def whole(rolled_out_qv: RolledOut, tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    return tune(rolled_out_qv, tmp_path_factory.mktemp("whole") / "out")


def run_until_killed(given: RolledOut, out: Path, dies_at: int | None) -> None:
    """Runs in a process of its own, which is killed from outside after step 5, or dies by itself."""
    adapters = {agent: str(path) for agent, path in given.adapters.items()}
    paths = [str(given.model_dir), adapters, str(given.results), str(out)]
    facts = [*paths, torch.get_num_threads(), dataclasses.asdict(OPTIONS), dies_at]
    command = [sys.executable, "-c", RUN, json.dumps(facts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if dies_at is None and line.strip() == "5":
                run.kill()
        errors = run.stderr.read()
    assert run.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize("dies_at", [None, 8], ids=["between any two instructions", "as it writes a checkpoint"])
def test_a_killed_run_goes_on_to_the_bit(
    rolled_out_qv: RolledOut, whole: TuneReport, tmp_path: Path, dies_at: int | None
) -> None:
    out = tmp_path / "out"
    run_until_killed(rolled_out_qv, out, dies_at)
    saved = read_checkpoint(out / CHECKPOINT)
    assert saved is not None and 3 <= saved.progress.step < STEPS
    assert not (out / "tune_report.json").exists()
    resumed = tune(rolled_out_qv, out, existing="resume")
    assert sorted(entry.name for entry in out.iterdir()) == ["action", "plan", "reflect", "tune_report.json"]
    for agent in whole.agents:
        (before, after) = (load_file(folder / agent / "adapter_model.safetensors") for folder in (whole.out, out))
        assert all(torch.equal(before[key], after[key]) for key in before), agent
    assert (resumed.rounds[0].losses, resumed.after) == (whole.rounds[0].losses, whole.after)
    assert len(resumed.rounds[0].losses) == STEPS
