"""`SharedModel` on another device. The device "meta" refuses to compute with tensors of the CPU, as a GPU does."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from lragent.loading.model import load_directories
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from tests.models import write_model
from tests.training.scripts import SCRIPT, sequence_of


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_frozen_weights_follow_the_parameters(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path / "model", kind, "all", False, {"plan": 4, "action": 8, "reflect": 4}, layers=2)
    model = SharedModel.of_model(load_directories(written.model_dir, written.adapters, "float32")).to("meta")
    scripts = (SCRIPT, [step for step in SCRIPT if step[1] != "base"])  # the second one is run in parts
    for scheme, script in product(("base_shared", "base_lr_shared", "rebase_shared", "neutral_shared"), scripts):
        rows = rows_of(scheme, [sequence_of(script)], model.agents).to(torch.device("meta"))
        logits = model(rows)
        assert logits.device.type == "meta"
        assert logits.shape[0] == len(rows.targets_R)
        logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
