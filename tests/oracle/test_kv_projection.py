"""The outputs of a projection that the oracle takes for K and V are exactly those that later tokens read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models import KINDS, write_model
from tests.oracle.kv_projection import kv_outputs
from tests.oracle.peft_oracle import load_plain
from tests.oracle.precision import computing_in

IDS = [5, 40, 77, 12, 90, 33, 8, 61]
CHANGED = 4  # its change is seen by later tokens, all within a window of eight


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_read_the_marked_outputs_and_no_others(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind)
    model = load_plain(written.model_dir, torch.float64)
    names = [n for n, _ in model.named_modules() if kv_outputs(n.rpartition(".")[2], model.config) is not None]
    last_layer = {n.rpartition(".")[2]: n for n in names}
    for leaf, name in last_layer.items():
        marked = kv_outputs(leaf, model.config)
        assert marked is not None
        assert torch.equal(_read_later(model, model.get_submodule(name), len(marked)), marked), name


def _read_later(model: nn.Module, projection: nn.Module, outputs: int) -> Tensor:
    """Which outputs at one token change the logits of later ones: one row of a batch for each output."""
    ids = torch.tensor([IDS]).expand(outputs + 1, -1)

    def change(_module: nn.Module, _inputs: object, result: Tensor) -> Tensor:
        changed = result.clone()
        changed[:outputs, CHANGED] += torch.eye(outputs, dtype=result.dtype)
        return changed

    handle = projection.register_forward_hook(change)
    try:
        with torch.no_grad(), computing_in(torch.float64):
            later = model(input_ids=ids, use_cache=False).logits[:, CHANGED + 1 :]
    finally:
        handle.remove()
    return (later[:-1] - later[-1]).abs().amax((1, 2)) > 1e-9
