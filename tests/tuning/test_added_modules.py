"""New adapters on modules that the given ones leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lragent
from lragent.errors import AdapterError
from lragent.loading.model import load_directories
from lragent.tuning.added_modules import modules_to_add, with_added_modules
from lragent.tuning.options import TuneOptions
from tests.oracle.peft_oracle import load_peft, logits
from tests.tuning.conftest import RolledOut

WEIGHTS = "adapter_model.safetensors"
IDS = [7, 31, 5, 99, 12]


def test_modules_are_named_by_their_ends(rolled_out_qv: RolledOut) -> None:
    loaded = load_directories(rolled_out_qv.model_dir, rolled_out_qv.adapters)
    ends = lambda names: {fqn.rpartition(".")[2] for fqn in modules_to_add(loaded, names)}  # noqa: E731
    assert ends(["o_proj", "mlp.up_proj"]) == {"o_proj", "up_proj"}
    assert len(modules_to_add(loaded, ["o_proj"])) == 2
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert ends(["all-linear"]) == everything
    with pytest.raises(AdapterError, match="--add-modules proj: no linear module") as error:
        modules_to_add(loaded, ["proj"])
    assert "down_proj, gate_proj" in error.value.hint


@pytest.mark.parametrize("rank", [None, 2])
def test_new_adapters_change_nothing_until_they_are_trained(
    rolled_out_qv: RolledOut, tmp_path: Path, rank: int | None
) -> None:
    loaded = load_directories(rolled_out_qv.model_dir, rolled_out_qv.adapters)
    folders = with_added_modules(loaded, modules_to_add(loaded, ["o_proj", "v_proj"]), rank, 0, tmp_path)
    before = load_peft(rolled_out_qv.model_dir, rolled_out_qv.adapters, torch.float64)
    after = load_peft(rolled_out_qv.model_dir, folders, torch.float64)
    for agent in folders:
        torch.testing.assert_close(logits(before, IDS, agent), logits(after, IDS, agent))
    again = load_directories(rolled_out_qv.model_dir, folders)
    old, new = ({f: w["plan"] for f, w in one.lora.items()} for one in (loaded, again))
    assert all(torch.equal(new[fqn].a, old[fqn].a) and new[fqn].scaling == old[fqn].scaling for fqn in old)
    added = [new[fqn] for fqn in new if fqn not in old]
    assert len(added) == 2 and {(w.rank, w.scaling) for w in added} == {(rank or 4, next(iter(old.values())).scaling)}
    shared = [again.lora[fqn] for fqn in new if fqn not in old]
    assert all(torch.equal(w["plan"].a, w["reflect"].a) for w in shared)  # as on the modules before


def test_new_adapters_are_trained_and_written(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    options = TuneOptions(steps=3, batch_tokens=200, held_out=0.2, add_modules=("o_proj", "down_proj"), add_rank=2)
    report = lragent.tune(
        rolled_out_qv.model_dir, rolled_out_qv.adapters, rolled_out_qv.results, tmp_path / "out", options=options
    )
    weights = load_file(report.out / "reflect" / WEIGHTS)
    added = {key: t for key, t in weights.items() if "o_proj" in key or "down_proj" in key}
    assert len(added) == 8 and all(t.abs().max() > 0 and 2 in t.shape for t in added.values())
    assert json.loads((report.out / "reflect" / "adapter_config.json").read_text())["r"] == 4
    load_peft(rolled_out_qv.model_dir, {agent: report.out / agent for agent in report.agents}, torch.float32)
