"""A program's steps become CUDA graphs only if the attention of every layer can; no GPU is needed to decide it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lragent.compile import compile as compile_module
from lragent.compile.compile import ProgramFacts, eager_call, program
from lragent.kernels.implementations import FALLBACK, IMPLEMENTATIONS
from lragent.passes.pipeline import lower, transform
from tests.passes.key_paths import norm_over_heads, norm_then_rotate
from tests.passes.stages import captured
from tests.passes.tiny_lm import Path, Tiny


class _Steps:
    """Stands for `DeviceSteps`: keeps the decision, runs nothing."""

    captures: bool

    def __init__(self, call: object, device: torch.device, capture: bool) -> None:
        _Steps.captures = capture

    def run(self, *inputs: object) -> Any:
        raise NotImplementedError


def _captures(key_path: Path, attention: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The decision for a model of two layers on a GPU."""
    rewritten = transform(captured(Tiny(key_path=key_path).build()), "split")
    lowered = lower(rewritten.graph, attention)
    facts = ProgramFacts(rewritten.schema, (), 64, 64, torch.float32, attention, lowered.fallback)
    monkeypatch.setattr(compile_module, "DeviceSteps", _Steps)
    program(eager_call(lowered.graph), facts, "eager", torch.device("cuda"))
    return _Steps.captures


def test_every_layer_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _captures(norm_then_rotate, "triton", monkeypatch)


def test_near_miss_layers_fall_back_to_one_that_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not IMPLEMENTATIONS[FALLBACK].cuda_graph_safe
    assert not _captures(norm_over_heads, "triton", monkeypatch)


def test_an_implementation_that_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _captures(norm_then_rotate, FALLBACK, monkeypatch)
