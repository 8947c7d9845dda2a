"""agent_slots: who shares an A is the same for slots, which updates keep, and for the columns of a program."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lragent.capture.capture import capture
from lragent.loading.agent_slots import agent_slots_of, fit, groups_of
from lragent.loading.model import LoadedModel, load_live
from lragent.passes.pipeline import transform
from tests.passes.tiny_lm import Tiny

MODULE = "blocks.0.gamma"


def _loaded(shared_a: bool = True, constants: tuple[str, ...] = ()) -> LoadedModel:
    """Three agents on V; those in `constants` have a constant too."""
    ranks = {"plan": 4, "action": 4, "reflect": 4}
    loaded = load_live(Tiny(targets=("gamma",), ranks=ranks, shared_a=shared_a, layers=1).build())
    lora = {
        module: {
            name: dataclasses.replace(w, constant=torch.ones(w.b.shape[0])) if name in constants else w
            for name, w in by_agent.items()
        }
        for module, by_agent in loaded.lora.items()
    }
    return dataclasses.replace(loaded, lora=lora)


CASES = [
    (_loaded, (0, 0, 0)),
    (lambda: _loaded(shared_a=False), (0, 1, 2)),
    (lambda: _loaded(constants=("plan",)), (0, 1, 1)),
    (lambda: _loaded(constants=("plan", "reflect")), (0, 1, 0)),
]


@pytest.mark.parametrize(("make", "group"), CASES)
def test_slots_and_program_agree_on_who_shares_an_a(make: object, group: tuple[int, ...]) -> None:
    assert callable(make)
    loaded = make()
    assert groups_of(loaded) == agent_slots_of(loaded, spare=0).groups == {MODULE: group}
    (stream,) = transform(capture(loaded), "split").schema.low_rank
    assert stream.shares_a_with == group


def test_a_fitted_model_keeps_the_groups_of_its_slots() -> None:
    apart = _loaded(shared_a=False)
    slots = agent_slots_of(apart, spare=1)
    assert slots.groups == {MODULE: (0, 1, 2, 3)}
    assert groups_of(fit(_loaded(), slots)) == {MODULE: (0, 1, 2, 3)}  # equal A now, other columns still
