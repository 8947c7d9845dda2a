"""The ops' schemas, fakes and mutation marks are what PyTorch's checks expect."""

from __future__ import annotations

import pytest
import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode

from lragent.kernels import cpp_library, ops, triton_library
from lragent.kernels.implementations import GRAPHS
from tests.kernels.attention_cases import CASES, Case, changed, kernel_of
from tests.kernels.test_write_cache import PAGE, PAGES

CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("case", [CASES[0], CASES[13]], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_attention_ops(name: str, case: Case) -> None:
    op = GRAPHS[name].target
    assert isinstance(op, OpOverload)
    torch.library.opcheck(op, case.build().arguments(), test_utils=CHECKS)


@pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")
def test_cpp_attention_op() -> None:
    cpp_library.load()
    torch.library.opcheck(cpp_library.ATTENTION, CASES[0].build().arguments(), test_utils=CHECKS)


def test_triton_attention_op_without_a_device() -> None:
    call = CASES[0].build()
    with FakeTensorMode() as mode:
        found = kernel_of(triton_library.ATTENTION)(changed(call, mode.from_tensor))
    assert found.shape == call.query_THqDk.shape and found.dtype == call.query_THqDk.dtype


def test_marker() -> None:
    args = (torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), None, 0, 0.3, 0, 0.0)
    torch.library.opcheck(ops.attention_marker, args, test_utils=CHECKS)


def test_writes() -> None:
    k_cache, v_cache = torch.zeros(PAGES, 2, PAGE, 4), torch.zeros(PAGES, 2, PAGE, 4)
    args = (torch.randn(3, 2, 4), torch.randn(3, 2, 4), k_cache, v_cache, torch.tensor([8, 9, 10]))
    torch.library.opcheck(ops.write_kv, args, test_utils=CHECKS)
    table = torch.tensor([[0, 0, 0, 0], [0, 2, 0, 1]])
    lr_args = (torch.randn(3, 2), torch.zeros(PAGES * PAGE * 2), table, torch.tensor([[8, 9, 10]]))
    torch.library.opcheck(ops.write_lr, lr_args, test_utils=CHECKS)
