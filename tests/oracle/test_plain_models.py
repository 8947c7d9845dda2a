"""What the oracle says where plain PEFT, or the plain base model, says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import KINDS, write_model
from tests.oracle.kv_projection import kv_outputs
from tests.oracle.peft_oracle import generate, load_peft, load_plain
from tests.oracle.precision import computing_in
from tests.oracle.sharing_oracle import final_base_streams, new_oracle, run_script

# Schemes under which the base streams are those of the model without adapters.
PLAIN_BASE = ("rebase_shared", "neutral_shared")
SCRIPT: tuple[tuple[Any, ...], ...] = (
    ("append", [5, 40, 77, 12, 90, 33, 8, 61, 102]),
    ("turn", "plan", 3, None),
    ("append", [17, 23]),
    ("turn", "action", 3, None),
    ("turn", "base", 2, None),
    ("turn", "plan", 2, None),
    ("truncate", 14),
    ("turn", "action", 2, None),
    ("fork",),
    ("turn", "reflect", 2, None),
)


@pytest.mark.parametrize("kind", KINDS)
def test_non_shared_generates_what_peft_generates(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind)
    model = load_peft(written.model_dir, written.adapters, torch.float64)
    turns = iter(run_script(written.model_dir, written.adapters, "non_shared", SCRIPT))
    ids: list[int] = []
    for step in SCRIPT:
        if step[0] == "append":
            ids += step[1]
        elif step[0] == "truncate":
            del ids[step[1] :]
        elif step[0] == "turn":
            found = next(turns)
            tokens, expected = generate(model, ids, step[1], step[2])
            assert found.token_ids == tokens
            assert found.logprobs == pytest.approx(expected, abs=1e-9)
            ids += tokens


@pytest.mark.parametrize("scheme", PLAIN_BASE)
@pytest.mark.parametrize("kind", KINDS)
def test_base_is_the_plain_model_whoever_wrote(kind: str, scheme: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind)
    oracle, _ = new_oracle(written.model_dir, written.adapters, scheme, torch.float64).play(SCRIPT)
    plain = load_plain(written.model_dir, torch.float64)
    ids = list(oracle.ids)
    turn = oracle.turn("base", 3, [44, 101, 9])
    _, expected = generate(plain, ids, "base", 3, [44, 101, 9])
    assert turn.logprobs == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_base_streams_are_the_plain_models_under_two_schemes_only(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind)
    ids = [5, 40, 77, 12, 90, 33, 8, 61, 102, 17, 23]
    script = (("append", ids[:6]), ("turn", "plan", 3, ids[6:9]), ("turn", "action", 2, ids[9:]))
    plain = _kv_streams(load_plain(written.model_dir, torch.float64), ids[:-1])  # the last token is still pending
    for scheme in (*PLAIN_BASE, "base_lr_shared", "base_shared"):
        held = final_base_streams(written.model_dir, written.adapters, scheme, script)
        largest = max(float((a - b).abs().max()) for a, b in zip(held, plain, strict=True))
        assert (largest < 1e-9) == (scheme in PLAIN_BASE), f"{scheme}: off by {largest}"


def _kv_streams(model: nn.Module, ids: list[int]) -> list[Tensor]:
    """K/V outputs of every projection of a model that nothing has been replaced in."""
    streams: list[Tensor] = []
    handles = []
    for name, module in model.named_modules():
        marked = kv_outputs(name.rpartition(".")[2], model.config)
        if marked is not None:
            handles.append(module.register_forward_hook(lambda _m, _i, out, kv=marked: streams.append(out[0][:, kv])))
    with torch.no_grad(), computing_in(torch.float64):
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return streams
