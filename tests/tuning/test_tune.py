"""Tuning as a whole: what it gains, what it writes, and that a killed run goes on to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lragent
from lragent.errors import TuneError
from lragent.files.locks import directory_lock
from lragent.loading.model import load_directories
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence
from lragent.tuning.options import TuneOptions
from lragent.tuning.report import TuneReport
from lragent.tuning.train import TuneStep
from tests.oracle.peft_oracle import load_peft, logits
from tests.tuning.conftest import RolledOut

WEIGHTS = "adapter_model.safetensors"
OPTIONS = TuneOptions(arithmetic="float32", steps=24, batch_tokens=200, held_out=0.3)
FEW = TuneOptions(arithmetic="float32", steps=4, batch_tokens=120, held_out=0.2, evaluations=2, checkpoint_seconds=0)


def tune(given: RolledOut, out: Path, options: TuneOptions, **more: object) -> TuneReport:
    return lragent.tune(given.model_dir, given.adapters, given.results, out, options=options, **more)  # type: ignore[arg-type]


def kl(report: TuneReport, when: str, scheme: str, agent: str) -> float:
    return getattr(report, when)[scheme][agent].kl


@pytest.fixture(scope="module")
def tuned(rolled_out: RolledOut, tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    return tune(rolled_out, tmp_path_factory.mktemp("tuned") / "out", OPTIONS)


def test_agents_come_nearer_to_their_own_distribution(tuned: TuneReport) -> None:
    assert tuned.held_out and (tuned.trajectories, tuned.measured) == (7, 3)
    for agent in ("action", "reflect"):
        before, after = (kl(tuned, when, "base_lr_shared", agent) for when in ("before", "after"))
        assert after < 0.6 * before, agent
    assert kl(tuned, "before", "base_lr_shared", "plan") < 1e-9  # it reads nothing that others wrote
    assert all(kl(tuned, "before", "non_shared", agent) < 1e-9 for agent in tuned.agents)
    assert tuned.rounds[0].kept_step in dict(tuned.rounds[0].held_out)


def test_gold_beside_results_leaves_them_their_kl(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    """Gold is not compared with a teacher; results in the same batch are."""
    mixed = tmp_path / "gold.jsonl"
    mixed.write_text('{"token_ids": [1, 2, 3, 4, 5, 6, 7, 8], "generated": [["plan", null, 3, 8]]}\n' * 6)
    options = replace(FEW, steps=1, batch_tokens=2000, cross_entropy=1e-9, held_out=0.0)
    files = [rolled_out_qv.results, mixed]
    report = lragent.tune(rolled_out_qv.model_dir, rolled_out_qv.adapters, files, tmp_path / "out", options=options)
    ((_, loss),) = report.rounds[0].losses
    assert loss > 1e-4


def test_only_trajectories_of_planned_steps_are_run(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    stages: list[str] = []
    options = replace(FEW, steps=1, batch_tokens=70, arithmetic="float32")
    report = tune(rolled_out_qv, tmp_path / "out", options, progress=stages.append)
    assert (report.trajectories, report.measured) == (1, 2)  # of 10
    assert "the agents' own distributions: 3 of 3 trajectories" in stages


@pytest.mark.parametrize("scheme", ["neutral_shared", "rebase_shared"])
def test_other_schemes_can_be_tuned_for(rolled_out_qv: RolledOut, tmp_path: Path, scheme: str) -> None:
    options = replace(OPTIONS, steps=12, batch_tokens=150, non_shared_share=0.2, permuted_writers=0.5)
    report = tune(rolled_out_qv, tmp_path / "out", options, sharing=scheme)
    assert report.after[scheme]["reflect"].kl < report.before[scheme]["reflect"].kl


def test_the_folder_holds_adapters_and_the_report(tuned: TuneReport) -> None:
    assert sorted(entry.name for entry in tuned.out.iterdir()) == ["action", "plan", "reflect", "tune_report.json"]
    assert json.loads((tuned.out / "tune_report.json").read_text()) == json.loads(json.dumps(tuned.to_dict()))


def test_files_are_as_the_parents(tuned: TuneReport, rolled_out: RolledOut) -> None:
    digests = {agent.name: agent.digest for agent in load_directories(rolled_out.model_dir, rolled_out.adapters).agents}
    for agent, parent in rolled_out.adapters.items():
        before, after = (load_file(path / WEIGHTS) for path in (parent, tuned.out / agent))
        assert {(key, t.shape, t.dtype) for key, t in before.items()} == {
            (k, t.shape, t.dtype) for k, t in after.items()
        }
        assert all(not torch.equal(before[key], after[key]) for key in before)
        config = "adapter_config.json"
        assert (tuned.out / agent / config).read_bytes() == (parent / config).read_bytes()
        with safe_open(tuned.out / agent / WEIGHTS, "pt") as opened:
            facts = json.loads(opened.metadata()["lragent"])
        assert (facts["sharing"], facts["agent"], facts["parents"]) == ("base_lr_shared", agent, digests)


def test_peft_computes_what_was_tuned(tuned: TuneReport, rolled_out: RolledOut) -> None:
    adapters = {agent: tuned.out / agent for agent in tuned.agents}
    loaded = load_directories(rolled_out.model_dir, adapters)
    assert {agent.tuned_for for agent in loaded.agents} == {"base_lr_shared"}
    model = SharedModel.of_model(loaded)
    peft = load_peft(rolled_out.model_dir, adapters, torch.float32)
    ids = [7, 31, 5, 99, 12, 64, 3, 80]
    for agent in adapters:
        rows = rows_of("non_shared", [TurnSequence(tuple(ids), (Turn(agent, 4, 8),))], model.agents)
        with torch.no_grad():
            found = model(rows)
        torch.testing.assert_close(found, logits(peft, ids, agent)[3:7], atol=1e-3, rtol=1e-3)


def test_adapters_that_every_step_makes_worse_stay(rolled_out: RolledOut, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=2, learning_rate=1.0)
    report = tune(rolled_out, tmp_path / "out", options)
    assert report.rounds[0].kept_step == 0 and report.after == report.before
    assert "they stay as they were" in " ".join(report.notes)
    for agent, parent in rolled_out.adapters.items():
        before, after = (load_file(path / WEIGHTS) for path in (parent, report.out / agent))
        assert all(torch.equal(before[key], after[key]) for key in before)


class Killed(Exception):
    pass


class KilledRuns:
    """Folders of runs that were killed after a step, each made when it is first asked for; read only."""

    def __init__(self, given: RolledOut, folder: Path) -> None:
        self._given, self._folder = given, folder

    def after(self, step: int) -> Path:
        def kill(now: TuneStep) -> None:
            if now.step == step:
                raise Killed

        out = self._folder / str(step)
        if not out.exists():
            with pytest.raises(Killed):
                tune(self._given, out, FEW, on_step=kill)
        return out


@pytest.fixture(scope="module")
def killed(rolled_out_qv: RolledOut, tmp_path_factory: pytest.TempPathFactory) -> KilledRuns:
    return KilledRuns(rolled_out_qv, tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def whole(rolled_out_qv: RolledOut, tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    return tune(rolled_out_qv, tmp_path_factory.mktemp("whole") / "out", FEW)


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(
    rolled_out_qv: RolledOut, whole: TuneReport, killed: KilledRuns, tmp_path: Path, killed_after: int
) -> None:
    shutil.copytree(killed.after(killed_after), tmp_path / "out")
    assert not (tmp_path / "out" / "plan").exists()
    with pytest.raises(TuneError, match="exists"):
        tune(rolled_out_qv, tmp_path / "out", FEW)
    resumed = tune(rolled_out_qv, tmp_path / "out", FEW, existing="resume")
    assert resumed.rounds[0].losses == whole.rounds[0].losses
    assert resumed.rounds[0].held_out == whole.rounds[0].held_out
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    for agent in whole.agents:
        files = [load_file(report.out / agent / WEIGHTS) for report in (whole, resumed)]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert tune(rolled_out_qv, tmp_path / "out", FEW, existing="resume") == resumed  # nothing is left to do


def test_a_run_is_not_resumed_with_other_options_or_trajectories(
    rolled_out_qv: RolledOut, killed: KilledRuns, tmp_path: Path
) -> None:
    shutil.copytree(killed.after(0), tmp_path / "out")
    with pytest.raises(TuneError, match="is of another run: options steps was 4 and is 5"):
        tune(rolled_out_qv, tmp_path / "out", replace(FEW, steps=5), existing="resume")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rolled_out_qv.results.read_text().splitlines(keepends=True)[:6]))
    with pytest.raises(TuneError, match="is of another run: trajectories was"):
        tune(replace(rolled_out_qv, results=fewer), tmp_path / "out", FEW, existing="resume")


def test_a_run_that_has_ended_is_not_taken_for_another(rolled_out_qv: RolledOut, whole: TuneReport) -> None:
    with pytest.raises(TuneError, match="is of another run: options steps was 4 and is 5"):
        tune(rolled_out_qv, whole.out, replace(FEW, steps=5), existing="resume")
    assert tune(rolled_out_qv, whole.out, replace(FEW, minutes=99), existing="resume") == whole


def test_a_run_is_not_resumed_with_another_base_model(
    rolled_out_qv: RolledOut, killed: KilledRuns, tmp_path: Path
) -> None:
    shutil.copytree(killed.after(0), tmp_path / "out")
    other = shutil.copytree(rolled_out_qv.model_dir, tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(TuneError, match="is of another run: model was"):
        tune(replace(rolled_out_qv, model_dir=other), tmp_path / "out", FEW, existing="resume")


def test_a_folder_in_use_is_not_overwritten(rolled_out_qv: RolledOut, killed: KilledRuns, tmp_path: Path) -> None:
    out = shutil.copytree(killed.after(1), tmp_path / "out")
    files = sorted(out.rglob("*"))
    with directory_lock(out), pytest.raises(TuneError, match="another run is tuning into"):
        tune(rolled_out_qv, out, FEW, existing="overwrite")
    assert sorted(out.rglob("*")) == files
    (out / ".plan.unfinished-1").mkdir()
    tune(rolled_out_qv, out, FEW, existing="overwrite")
    assert sorted(entry.name for entry in out.iterdir()) == [*sorted(rolled_out_qv.adapters), "tune_report.json"]


def test_a_shared_a_stays_shared_unless_it_is_untied(
    rolled_out_qv: RolledOut, whole: TuneReport, tmp_path: Path
) -> None:
    assert FEW.tie_a
    for report, tie in ((whole, True), (tune(rolled_out_qv, tmp_path / "out", replace(FEW, tie_a=False)), False)):
        files = [load_file(report.out / agent / WEIGHTS) for agent in ("action", "reflect")]
        equal = [torch.equal(files[0][key], files[1][key]) for key in files[0] if "lora_A" in key]
        assert all(equal) is tie


@pytest.mark.parametrize(("train_", "frozen"), [("a", "lora_B"), ("b", "lora_A")])
def test_matrices_that_are_not_trained_stay(rolled_out_qv: RolledOut, tmp_path: Path, train_: str, frozen: str) -> None:
    report = tune(rolled_out_qv, tmp_path / "out", replace(FEW, train=train_))  # type: ignore[arg-type]
    before, after = (
        load_file(folder / "reflect" / WEIGHTS) for folder in (rolled_out_qv.adapters["reflect"].parent, report.out)
    )
    for key in before:
        assert torch.equal(before[key], after[key]) is (frozen in key), key


def test_a_nan_loss_keeps_the_last_good_checkpoint(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    """Weights that a far too large rate has made infinite; the checkpoint is that of the step before."""
    with pytest.raises(TuneError, match=r"step \d+ is NaN or infinite; .* keeps the last good weights"):
        tune(rolled_out_qv, tmp_path / "out", replace(FEW, steps=30, learning_rate=1e30))
    saved = load_file(tmp_path / "out" / ".tuning" / "round-1.safetensors")
    assert all(bool(t.isfinite().all()) for t in saved.values())
    report = tune(rolled_out_qv, tmp_path / "out", replace(FEW, steps=30, learning_rate=1e-4), existing="resume")
    assert report.rounds[0].steps > 0


def test_a_second_round_learns_from_the_tuned_agents(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    work = {"workflow": f"{rolled_out_qv.workflow}:run", "tasks": rolled_out_qv.tasks}
    report = tune(rolled_out_qv, tmp_path / "out", FEW, rounds=2, **work)
    assert len(report.rounds) == 2
    assert kl(report, "after", "base_lr_shared", "reflect") < kl(report, "before", "base_lr_shared", "reflect")
    assert not (tmp_path / "out" / ".tuning").exists()
