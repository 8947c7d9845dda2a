"""The forward of an engine in memory is that of its program; opening it captures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lragent
from lragent.errors import SplitRefused
from lragent.training.schemes import rows_of
from tests.models import WrittenModel
from tests.models.variants import write_variants
from tests.oracle.peft_oracle import load_peft
from tests.training.scripts import SCRIPT, differences, logprobs, sequence_of
from tests.training.test_update_engine import engine_logprobs


def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("the model is exported again")


def test_an_engine_in_memory_opens_its_program(tiny_llama: WrittenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program still runs afterwards."""
    peft = load_peft(tiny_llama.model_dir, tiny_llama.adapters, torch.float32)
    engine = lragent.optimize(peft, "base_lr_shared", backend="eager", kv_memory="4MiB")
    monkeypatch.setattr(torch.export, "export", refuse)
    assert engine.evidence.open_model is not None
    model = engine.evidence.open_model()
    found = logprobs(model, rows_of("base_lr_shared", [sequence_of(SCRIPT)], model.agents))
    assert max(differences(found, engine_logprobs(engine))) < 1e-4


def test_a_model_that_can_not_be_split_has_none(tmp_path: Path) -> None:
    written = write_variants(tmp_path, "llama", {"plan": {"use_dora": True, "target_modules": ["k_proj"]}})
    peft = load_peft(written.model_dir, written.adapters, torch.float32)
    engine = lragent.optimize(peft, "full_shared", backend="eager", kv_memory="4MiB")
    assert engine.evidence.open_model is not None
    with pytest.raises(
        SplitRefused, match="LlamaForCausalLM has no split program, which a forward under other schemes"
    ):
        engine.evidence.open_model()
