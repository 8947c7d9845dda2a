"""The C++ kernel against the reference: its error to float64 is at most twice the reference's own, plus a rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lragent.kernels import cpp_library
from lragent.kernels.attention_call import AttentionCall
from tests.kernels.attention_cases import (
    CASES,
    Case,
    assert_as_exact_as_half_precision,
    assert_as_exact_as_reference,
    kernel_of,
    rounded,
)

pytestmark = pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")

OP = kernel_of(cpp_library.ATTENTION)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sequences that take other ways through the kernel than those of `CASES`.
SHAPES = {
    "decodes": ((17, 1, 1), (33, 1, 2), (1, 1, 0), (48, 1, 3)),
    "long decodes": ((700, 1, 1), (1500, 1, 3)),
    "long chunks": ((300, 200, 1), (90, 60, 3)),
    "agents in a chunk": ((300, 9, (1, 1, 1, 3, 3, 3, 2, 2, 0)),),
}


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    cpp_library.load()


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    assert_as_exact_as_reference(OP, case.build())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES[:16], ids=lambda case: case.name)
def test_shapes(case: Case, shape: str) -> None:
    assert_as_exact_as_reference(OP, replace(case, sequences=SHAPES[shape]).build())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_dtypes(cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for case in CASES[::2]:
        assert_as_exact_as_reference(OP, rounded(case, cache_dtype).build(dtype))
        longer = replace(rounded(case, cache_dtype), sequences=SHAPES["long chunks"])
        assert_as_exact_as_reference(OP, longer.build(dtype))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64, 32), (80, 96, 16), (20, 12, 8), (128, 64, 24)], ids=str)
def test_usual_and_odd_sizes(dims: tuple[int, int, int], cache_dtype: torch.dtype) -> None:
    k_dim, v_dim, page_size = dims
    for rope in ("half", "interleaved", "partial"):
        case = Case(
            "sizes", k_dim=k_dim, v_dim=v_dim, page_size=page_size, rope=rope, ranks=(8, 3, 17), cache_dtype=cache_dtype
        )
        assert_as_exact_as_reference(OP, case.build())
        assert_as_exact_as_reference(OP, replace(case, final=False, norm=True).build())


@pytest.mark.parametrize("shape", [*SHAPES, ""])
@pytest.mark.parametrize("dims", [(64, 64, 32), (32, 96, 16), (128, 64, 48), (64, 64, 8)], ids=str)
def test_bfloat16_numbers_in_pairs(dims: tuple[int, int, int], shape: str) -> None:
    """Sizes that some processors multiply in pairs, but for a page of eight tokens; ranks are odd, even and zero."""
    k_dim, v_dim, page_size = dims
    for rope in ("half", "interleaved", ""):
        case = Case(
            "pairs", k_dim=k_dim, v_dim=v_dim, page_size=page_size, rope=rope, ranks=(8, 0, 17),
            cache_dtype=torch.bfloat16,
        )  # fmt: skip
        if shape:
            case = replace(case, sequences=SHAPES[shape])
        assert_as_exact_as_half_precision(OP, case.build(torch.bfloat16))
        assert_as_exact_as_half_precision(OP, replace(case, final=False, norm=True).build(torch.bfloat16))


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("case", CASES[:16], ids=lambda case: case.name)
def test_context_split_over_threads(case: Case) -> None:
    for shape in ("long decodes", "long chunks"):
        assert_as_exact_as_reference(OP, replace(case, sequences=SHAPES[shape]).build())


def _with_common_pages(call: AttentionCall, common: tuple[int, ...]) -> AttentionCall:
    """Sequence s > 0 begins with the first `common[s - 1]` pages of sequence 0."""
    table = call.page_table_SM.clone()
    for s, pages in enumerate(common, 1):
        table[s, :pages] = table[0, :pages]
    return replace(call, page_table_SM=table)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES[:16], ids=lambda case: case.name)
def test_common_pages_are_read_for_all(case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Two rows of one token, forks of forks, one that ends where its common pages end, and one of its own.
    lengths_and_agents = ((330, 0), (330, 1), (335, 3), (322, 1), (320, 2), (150, 1), (40, 1))
    forks = replace(case, sequences=tuple((length, 1, agent) for length, agent in lengths_and_agents))
    assert_as_exact_as_reference(OP, _with_common_pages(forks.build(), (21, 20, 18, 20, 9, 0)))
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 16, 17, 45])
@pytest.mark.parametrize("case", CASES[:16], ids=lambda case: case.name)
def test_decodes_with_the_same_keys_share_them(case: Case, length: int) -> None:
    """Rows of one token under several agents, and another text of the same length."""
    rows = replace(case, sequences=tuple((length, 1, agent) for agent in (2, 0, 1, 3)))
    pages = -(-length // case.page_size)
    assert_as_exact_as_reference(OP, _with_common_pages(rows.build(), (pages, pages, 0)))


class _Attention(torch.nn.Module):
    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, query: Tensor) -> Tensor:
        return OP(replace(self.call, query_THqDk=query + 0.0)) * 1.0


@pytest.mark.slow
def test_inside_a_package_compiled_ahead_of_time(tmp_path: Path) -> None:
    call = CASES[0].build()
    program = torch.export.export(_Attention(call), (call.query_THqDk,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
    found = torch._inductor.aoti_load_package(package)(call.query_THqDk)
    torch.testing.assert_close(found, OP(call))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_THqDk": torch.zeros(22, 5, 8)}, "multiple of KV heads"),
        ({"context_lens_S": torch.zeros(4, dtype=torch.int32)}, "context_lens must be contiguous int64"),
        ({"agent_ids_T": torch.full((22,), 4)}, "agent 4"),
        ({"context_lens_S": torch.tensor([17, 33, 1, 4000])}, "page table"),
        ({"page_table_SM": torch.full((4, 4), 10_000)}, "page 10000"),
        ({"lr_v": torch.zeros(8)}, "LR block of agent 1"),
        ({"rope_partner": torch.full((8,), 8)}, "channel 8"),
        ({"rope_cos": torch.zeros(20, 8), "rope_sin": torch.zeros(20, 8)}, "longer than the rotation table"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_read_elsewhere_is_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OP(replace(CASES[0].build(), **change))
