"""Adapters of a model that a loop of the user's trained, as PEFT directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lragent
from lragent.errors import RequestError, TuneError
from lragent.loading.model import load_directories
from lragent.loading.tuned_metadata import tuned_for
from lragent.training.turn_sequence import Turn
from tests.oracle.peft_oracle import load_peft, logits
from tests.tuning.conftest import RolledOut


def test_saved_adapters_are_what_was_trained(rolled_out: RolledOut, tmp_path: Path) -> None:
    loaded = load_directories(rolled_out.model_dir, rolled_out.adapters, "float32")
    model = lragent.SharedModel.of_model(loaded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    written = lragent.save_adapters(loaded, model, tmp_path / "out", "base_lr_shared", steps=7)
    assert written == {agent: tmp_path / "out" / agent for agent in rolled_out.adapters}
    for agent, folder in written.items():
        assert tuned_for(agent, folder) == "base_lr_shared"
        before, after = (load_file(path / "adapter_model.safetensors") for path in (rolled_out.adapters[agent], folder))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor * 1.1)
    ids = list(range(3, 40, 3))
    turns = lragent.TurnSequence(tuple(ids), (Turn("action", 5, len(ids)),))
    ours = model(lragent.rows_of("non_shared", [turns], model.agents))
    theirs = logits(load_peft(rolled_out.model_dir, written, torch.float32), ids, "action")
    torch.testing.assert_close(ours, theirs[4:-1], rtol=1e-3, atol=1e-4)


def test_bad_requests(rolled_out: RolledOut, tmp_path: Path) -> None:
    loaded = load_directories(rolled_out.model_dir, rolled_out.adapters, "float32")
    model = lragent.SharedModel.of_model(loaded)
    with pytest.raises(RequestError, match="unknown sharing scheme 'shared'"):
        lragent.save_adapters(loaded, model, tmp_path / "out", "shared")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TuneError, match="can't be written"):
        lragent.save_adapters(loaded, model, blocked, "base_lr_shared")
