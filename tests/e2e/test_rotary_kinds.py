"""Every kind of rotary embedding: equal to PEFT decoding one by one on its own cache, and to the scheme's definition.

The compared text goes on beyond the positions that scaled kinds were trained on. Where a kind has other frequencies for
longer texts, transformers leaves keys in its cache as they were rotated, so that its answer depends on how the text was
cut into calls; our trajectories end there.
"""

from __future__ import annotations

import pytest
import torch

import lragent
from lragent.errors import RequestError
from tests.coverage.rotary import ROTARY, SWITCH
from tests.coverage.sweep import examine_apart
from tests.coverage.tiny_model import AGENTS, adapted_model

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61, 102, 55, 7, 19]
TOKENS = 24


@pytest.mark.parametrize("row", ROTARY)
def test_equals_peft_that_decodes_one_by_one(row: str) -> None:
    model = adapted_model(row)
    engine = lragent.optimize(model, sharing="non_shared", kv_memory="4MiB", backend="eager", attention="torch")
    for agent in AGENTS:
        model.set_adapter(agent)
        with torch.no_grad():
            ids = model.generate(
                input_ids=torch.tensor([PROMPT]),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=-1,
                use_cache=True,
            )
        with engine.trajectory(PROMPT) as t:
            found = t.generate(agent, max_new_tokens=TOKENS, ignore_eos=True).token_ids
        assert found == ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("row", ["llama with yarn", "llama with longrope", "stablelm with dynamic"])
def test_equals_the_definition(row: str) -> None:
    found = examine_apart(row)
    assert found["verdict"] == "split", found


@pytest.mark.slow
@pytest.mark.parametrize("row", ROTARY)
def test_every_kind_equals_the_definition(row: str) -> None:
    found = examine_apart(row)
    assert found["verdict"] == "split", found


def test_trajectories_end_where_other_frequencies_begin() -> None:
    engine = lragent.optimize(adapted_model("llama with longrope"), kv_memory="4MiB", backend="eager")
    with engine.trajectory(PROMPT) as t:
        turn = t.generate("plan", max_new_tokens=2 * SWITCH, ignore_eos=True)
        assert len(PROMPT) + len(turn.token_ids) == SWITCH
        t.append([3])
        with pytest.raises(RequestError, match=f"has {SWITCH + 1} tokens, the model has {SWITCH} positions"):
            t.generate("plan", max_new_tokens=1)
