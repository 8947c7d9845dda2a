"""adapter_hook: the marker shows a wrong input or output, in every dtype and for every kind of module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from lragent.capture.checks import require_same_logits
from lragent.errors import ModelError
from lragent.graph.adapter_marker import adapter_markers
from lragent.loading.adapter_hook import Hook, adapter_marker
from tests.passes.stages import captured
from tests.passes.tiny_lm import Tiny

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODULES = {
    "linear": (lambda: nn.Linear(6, 10), lambda dtype: torch.randn(1, 3, 6).to(dtype)),
    "conv1d": (lambda: Conv1D(10, 6), lambda dtype: torch.randn(1, 3, 6).to(dtype)),
    "expert": (lambda: nn.Linear(6, 10, bias=False), lambda dtype: torch.randn(5, 6).to(dtype)),
    "embedding": (lambda: nn.Embedding(7, 10), lambda dtype: torch.tensor([[0, 6, 2]])),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_the_delta_has_rank_one_and_is_fixed(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, inputs = MODULES[kind]
    base, x = make().to(dtype), inputs(dtype)
    out: Tensor = Hook(base, "a.b")(x)
    y = base(x)
    assert out.dtype == dtype and out.shape == y.shape
    assert torch.equal(out, Hook(base, "a.b")(x)) and not torch.equal(out, Hook(base, "a.c")(x))
    delta = adapter_marker(x, torch.zeros_like(y), "a.b").double().reshape(-1, 10)
    values = torch.linalg.svdvals(delta)
    assert float(values[0]) > 0.01
    # Each entry is a product rounded once, by eps of it at most; LAPACK's own error grows with the larger dimension.
    rounding = torch.finfo(dtype).eps + max(delta.shape) * torch.finfo(torch.float64).eps
    assert float(values[1]) <= rounding * float(delta.norm())
    assert len(delta.unique(dim=0)) == len(delta)  # no two rows of x have the same delta


def test_the_op_keeps_the_rules_of_custom_ops() -> None:
    for x in (torch.randn(1, 3, 6), torch.tensor([[0, 6, 2]])):
        torch.library.opcheck(adapter_marker, (x, torch.randn(1, 3, 10), "a.b"))


def _another_input(marker: fx.Node) -> None:
    x, y, module = marker.args
    assert isinstance(x, fx.Node)
    with marker.graph.inserting_before(marker):
        marker.args = (marker.graph.call_function(torch.ops.aten.roll.default, (x, [1], [-1])), y, module)


def _another_output(marker: fx.Node) -> None:
    x, y, module = marker.args
    assert isinstance(y, fx.Node)
    with marker.graph.inserting_before(marker):
        marker.args = (x, marker.graph.call_function(torch.ops.aten.neg.default, (y,)), module)


def _another_module(marker: fx.Node) -> None:
    marker.args = (*marker.args[:2], "blocks.1.gamma")


@pytest.mark.parametrize("mutate", [_another_input, _another_output, _another_module])
def test_capture_sees_a_marker_that_went_wrong(mutate: object) -> None:
    source = captured(Tiny(targets=("gamma", "head")).build())
    require_same_logits(source.graph, source.loaded)
    assert callable(mutate)
    mutate(adapter_markers(source.graph)[0])
    source.graph.recompile()
    with pytest.raises(ModelError, match="differs from the model"):
        require_same_logits(source.graph, source.loaded)
