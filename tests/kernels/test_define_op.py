"""define_op: the schema of a dataclass is the one that PyTorch infers from a function with the same arguments."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lragent.kernels import implementations, ops
from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.define_op import schema_of, unpacked


@dataclass(frozen=True)
class _Arguments:
    x: Tensor
    weight: Tensor | None
    eps: float
    final: bool
    window: int
    slopes: Tensor | None = None


def _function(
    x: Tensor, weight: Tensor | None, eps: float, final: bool, window: int, slopes: Tensor | None = None
) -> Tensor:
    raise NotImplementedError


def test_schema() -> None:
    assert schema_of(_Arguments) == torch.library.infer_schema(_function, mutates_args=())


def test_a_field_of_another_type_is_refused() -> None:
    @dataclass
    class Strange:
        sizes: str

    with pytest.raises(KeyError):
        schema_of(Strange)


def test_kernels_get_their_arguments_by_place_and_by_name() -> None:
    def kernel(arguments: _Arguments) -> Tensor:
        return arguments.x * arguments.window + (0 if arguments.slopes is None else arguments.slopes)

    function = unpacked(_Arguments, kernel)
    x = torch.ones(2)
    assert function.__name__ == "kernel"
    assert function(x, None, 0.0, True, 3).tolist() == [3, 3]
    assert function(x, None, 0.0, True, window=3, slopes=x).tolist() == [4, 4]


def test_every_attention_op_takes_the_fields_of_a_call() -> None:
    targets = [graph.target for graph in implementations.GRAPHS.values()]
    found = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    assert len(found) == 4 and ops.flash_lora_attention in found
    for op in found:
        assert str(op._schema) == f"{op.name()}{schema_of(AttentionCall)}"
