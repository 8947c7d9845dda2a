"""Base streams and low-rank parts across agents, against PEFT's own modules."""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.artifact.directory import open_artifact
from lragent.training import stream_distances as module
from lragent.training.open_model import shared_model_of_artifact
from lragent.training.shared_model import SharedModel
from lragent.training.stream_distances import StreamDistance, stream_distances
from lragent.training.turn_sequence import Turn, TurnSequence
from tests.models import WrittenModel
from tests.oracle.peft_oracle import load_peft, logits

IDS = tuple((11 * i * i + 5 * i + 3) % 120 for i in range(24))
GIVEN = [TurnSequence(IDS, (Turn("plan", 4, 20),)), TurnSequence(IDS[::-1], (Turn("action", 4, 20),))]
SIDES = {"K": "k_proj", "V": "v_proj"}


@pytest.fixture(scope="module")
def model(eager_artifact: Path) -> SharedModel:
    return shared_model_of_artifact(open_artifact(eager_artifact))


def by_pair(found: tuple[StreamDistance, ...]) -> dict[tuple[str, str, str], StreamDistance]:
    return {(pair.writer, pair.reader, pair.side): pair for pair in found}


def inputs_of(peft: Any, agent: str) -> dict[str, list[Tensor]]:
    """Module name -> its input for each sequence when one agent runs all tokens but the last."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        adapted.register_forward_hook(lambda _, given, __, name=name: found[name].append(given[0][0]))
        for name, adapted in peft.named_modules()
        if name.endswith(tuple(SIDES.values()))
    ]
    for sequence in GIVEN:
        logits(peft, list(sequence.token_ids[:-1]), agent)
    for hook in hooks:
        hook.remove()
    return found


def test_equals_what_the_modules_of_peft_compute(model: SharedModel, tiny_llama: WrittenModel) -> None:
    """A rotation, which the cached K has and the projection has not, changes no norm of a difference."""
    peft = load_peft(tiny_llama.model_dir, tiny_llama.adapters, torch.float64)
    inputs = {agent: inputs_of(peft, agent) for agent in ("base", *tiny_llama.adapters)}
    found = by_pair(stream_distances(model, GIVEN))
    assert set(found) == {(i, j, side) for i, j in permutations(tiny_llama.adapters, 2) for side in SIDES}
    for (i, j, side), pair in found.items():
        names = [name for name in inputs["base"] if name.endswith(SIDES[side])]
        assert len(names) == 2
        streams: dict[str, list[Tensor]] = defaultdict(list)
        for name in names:
            adapted = peft.get_submodule(name)

            def part(x: Tensor, agent: str, adapted: Any = adapted) -> Tensor:
                return adapted.scaling[agent] * adapted.lora_B[agent](adapted.lora_A[agent](x))

            for number in range(len(GIVEN)):
                x = {agent: values[name][number] for agent, values in inputs.items()}
                base = {agent: adapted.base_layer(x[agent]) for agent in (i, j, "base")}
                streams["writer"].append(base[i] - base["base"])
                streams["reader"].append(base[j] - base["base"])
                streams["own"].append(part(x[j], j))
                streams["read"].append(part(x[i], j) - part(x[j], j))
                streams["whole"].append(part(x[i], i) - part(x[j], j))
        flat = {name: torch.cat([value.flatten() for value in values]) for name, values in streams.items()}
        norm = {name: float(values.detach().norm()) for name, values in flat.items()}
        cosine = float((flat["writer"] @ flat["reader"]).detach()) / (norm["writer"] * norm["reader"])
        assert pair.rho == pytest.approx(norm["writer"] / norm["reader"], rel=1e-3)
        assert pair.cos == pytest.approx(cosine, abs=1e-3)
        assert pair.low_rank == pytest.approx(norm["read"] / norm["own"], rel=1e-3)
        assert pair.whole == pytest.approx(norm["whole"] / norm["own"], rel=1e-3)
        nearer = norm["reader"] <= float((flat["writer"] - flat["reader"]).detach().norm())
        assert pair.neutral_is_nearer == nearer


def test_only_a_part_of_many_trajectories_is_run(model: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEQUENCES", 1)
    monkeypatch.setattr(module, "TOKENS", 12)
    short = [TurnSequence(IDS[:13], (Turn("plan", 4, 9),))]
    assert stream_distances(model, GIVEN) == stream_distances(model, short)
    assert stream_distances(model, [TurnSequence(IDS[:1], ())]) == ()
