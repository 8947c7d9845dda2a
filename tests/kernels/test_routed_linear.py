"""routed_linears: projections with their agents' adapters, in PyTorch and in C++, against a loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.kernels import cpp_library, ops
from lragent.kernels.routed_linear import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cpp = pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")


@dataclass(frozen=True)
class Case:
    """Two adapted projections (the second with a bias and a shared A), one plain, and their down-projections.

    The first down-projection has a bias: columns that are the constant one, as adapters with biases have them.
    Agents 1 and 3 share their A on the second projection; agent 2 has no adapter there. With `own`, down-projections
    aren't asked for by themselves (and have no bias).
    """

    tokens: int
    inputs: int
    features: tuple[int, int, int] = (40, 24, 7)
    ranks: tuple[int, int, int] = (8, 3, 17)
    own: bool = False

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        torch.manual_seed(self.tokens * 1000 + self.inputs)
        first, second, plain = self.features
        r1, r2, r3 = self.ranks
        widths = (first, second, plain, r1 + r2 + r3, r1)
        weights = [torch.randn(n, self.inputs) * self.inputs**-0.5 for n in widths]
        bias, up_first, up_second = torch.randn(second), torch.randn(r1 + r2 + r3, first), torch.randn(2 * r1, second)
        ones = (torch.arange(r1 + r2 + r3) % 3 == 0).float()
        tensors = [t.to(dtype) for t in (*weights, bias, up_first, up_second, ones)]
        routes_first = [0, 0, 0, 0, 0, r1, r1, r1, r2, r1 + r2, r1 + r2, r3]
        routes_second = [0, 0, 0, 0, 0, r1, 0, 0, 0, 0, r1, r1]
        lists = [[-1, 5, -1, 8, -1], [6, 7, -1, -1, -1], [3, 4, -1, -1, -1]]
        if self.own:
            lists = [[-1, 5, -1], [6, 7, -1], [3, 4, -1]]
        return (
            torch.randn(1, self.tokens, self.inputs).to(dtype),
            torch.randint(0, 4, (self.tokens,)),
            tensors,
            *lists,
            [3, *routes_first, *routes_second],
        )


CASES = [
    Case(1, 64),
    Case(2, 576),
    Case(5, 100),
    Case(9, 64, features=(64, 32, 16), ranks=(8, 8, 8)),
    Case(3, 96, features=(260, 200, 64)),
    Case(4, 576, features=(64, 576, 128), ranks=(16, 3, 5), own=True),
    Case(12, 70, ranks=(1, 128, 5)),
    Case(130, 36),
    Case(300, 800, features=(33, 192, 1)),
    Case(1, 64, own=True),
    Case(7, 100, own=True),
    Case(40, 1000, ranks=(16, 40, 5), own=True),
    Case(300, 64, ranks=(1, 2, 3), own=True),
]


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return [_double(v) for v in value] if isinstance(value, list) else value


def _by_loops(x: Tensor, agent_ids: Tensor, tensors: list[Tensor], bias_of: Any, up_of: Any, down_of: Any,
              routes: list[int]) -> Tensor:  # fmt: skip
    """Every token by itself, straight from the definition."""
    rows = []
    for token, agent in zip(x[0], agent_ids.tolist(), strict=True):
        outputs = [tensors[i] @ token + (tensors[bias] if bias >= 0 else 0) for i, bias in enumerate(bias_of)]
        total, tables = [], 0
        for i, output in enumerate(outputs):
            if up_of[i] >= 0:
                at = 1 + tables * (routes[0] + 1) * 3 + agent * 3
                source, target, rank = routes[at : at + 3]
                down = down_of[i]
                low = outputs[down] if down < len(outputs) else tensors[down] @ token
                own = low[source : source + rank]
                output = output + own @ tensors[up_of[i]][target : target + rank]
                tables += 1
            total.append(output)
        rows.append(torch.cat(total))
    return torch.stack(rows)[None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    arguments = _double(list(case.arguments(torch.float32)))
    torch.testing.assert_close(reference.routed_linears(*arguments), _by_loops(*arguments), rtol=1e-12, atol=1e-12)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_is_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    """It may err twice as much as the reference in the same dtype does against float64."""
    cpp_library.load()
    arguments = case.arguments(dtype)
    truth = reference.routed_linears(*_double(list(arguments)))
    allowed = (reference.routed_linears(*arguments).double() - truth).abs().max()
    found = ops.routed_linears(*arguments)
    assert found.dtype == dtype
    assert (found.double() - truth).abs().max() <= 2 * allowed


@needs_cpp
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_threads_do_not_change_a_bit(tokens: int) -> None:
    cpp_library.load()
    arguments = Case(tokens, 1024, features=(1280, 2016, 72)).arguments(torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(ops.routed_linears(*arguments))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_cpp
def test_cpp_takes_rows_that_lie_apart_and_no_rows() -> None:
    cpp_library.load()
    x, *rest = Case(6, 64).arguments(torch.float32)
    wide = torch.randn(1, 6, 100)
    wide[..., 10:74] = x
    assert torch.equal(ops.routed_linears(wide[..., 10:74], *rest), ops.routed_linears(x, *rest))
    assert ops.routed_linears(x[:, :0], rest[0][:0], *rest[1:]).shape == (1, 0, 40 + 24 + 7 + 28 + 8)


@needs_cpp
def test_cpp_refuses_what_does_not_fit() -> None:
    cpp_library.load()
    x, ids, tensors, *rest = Case(3, 64).arguments(torch.float32)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        ops.routed_linears(x[..., 1:], ids, tensors, *rest)
    with pytest.raises(IndexError, match="agent id 4"):
        ops.routed_linears(x, ids + 4, tensors, *rest)
    with pytest.raises(RuntimeError, match="routes must hold"):
        ops.routed_linears(x, ids, tensors, *rest[:-1], [7, *rest[-1][1:]])


@needs_cpp
def test_op_is_what_pytorch_expects() -> None:
    cpp_library.load()
    arguments = Case(5, 64).arguments(torch.float32)
    torch.library.opcheck(ops.routed_linears, arguments, test_utils=("test_schema", "test_faketensor"))
