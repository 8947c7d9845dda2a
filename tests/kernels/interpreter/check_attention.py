"""The Triton attention kernels in the interpreter: run by `tests/kernels/test_triton_interpreted.py`.

float32 against the reference's own error, as all implementations; half precision against the error of the same
definition computed in that dtype throughout. What a kernel writes into begins as NaN, and so
does what it must not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention.triton.launch import LaunchConfig, flash_lora_attention
from lragent.kernels.flash_lora_attention.triton.variants import Tiles
from tests.kernels.attention_cases import (
    CASES,
    Case,
    Kernel,
    assert_as_exact_as_half_precision,
    assert_as_exact_as_reference,
    tensors_of,
)
from tests.kernels.interpreter import shim

SMALL = LaunchConfig(decode=Tiles(8, 32, 16, 4, 1), prefill=Tiles(32, 16, 16, 4, 1), splits=3)
LARGE = LaunchConfig(
    decode=Tiles(16, 64, 32, 4, 2, unroll=True), prefill=Tiles(64, 64, 64, 8, 2, unroll=True), splits=1
)
# Decodes, one of which leaves splits empty, agents in a chunk, and the model without adapter.
MIXED = ((70, 1, 1), (33, 9, (1, 1, 1, 3, 3, 3, 2, 2, 0)), (1, 1, 0))
HALF = (torch.bfloat16, torch.float16)
WIDE = Case("wide", sequences=MIXED, k_dim=64, v_dim=64, ranks=(16, 0, 8))
FEATURES = {
    "plain": WIDE,
    "interleaved": replace(WIDE, rope="interleaved", ranks=(16, 0, 5)),
    "norm": replace(WIDE, norm=True, final=False),
    "window, cap, sinks": replace(WIDE, window=40, softcap=4.0, sinks=True),
    "everything": replace(WIDE, norm=True, final=False, rope="partial", window=21, softcap=4.0, sinks=True),
}


@pytest.fixture(autouse=True)
def _exact_bfloat16() -> Iterator[None]:
    with shim.exact_bfloat16():
        yield


def watched(plan: LaunchConfig) -> Kernel:
    """The kernels under a plan; an access outside the arguments raises."""

    def run(call: AttentionCall) -> Tensor:
        with shim.watched(tensors_of(call)):
            return flash_lora_attention(call, plan)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    assert_as_exact_as_reference(watched(SMALL), case.build())


@pytest.mark.slow
@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
def test_other_tiles(case: Case) -> None:
    assert_as_exact_as_reference(watched(LARGE), case.build())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_half_precision(watched(LARGE), replace(case, cache_dtype=dtype).build(dtype))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_cache_of_a_float32_model(cache_dtype: torch.dtype) -> None:
    for name in ("plain", "everything"):
        assert_as_exact_as_reference(watched(SMALL), replace(FEATURES[name], cache_dtype=cache_dtype).build())


@pytest.mark.parametrize(
    "sizes",
    [
        {"k_dim": 80, "v_dim": 96, "page_size": 8, "ranks": (3, 1, 17)},
        {"k_dim": 24, "v_dim": 12, "page_size": 64, "group": 17, "heads": 1},
        {"k_dim": 128, "v_dim": 64, "page_size": 32, "ranks": (64, 2, 0), "rope": "partial"},
        {"k_dim": 256, "v_dim": 256, "ranks": (128, 0, 0), "heads": 1, "rope": "interleaved"},
    ],
    ids=lambda sizes: f"{sizes['k_dim']}-{sizes['v_dim']}",
)
@pytest.mark.parametrize("final", [True, False], ids=["final", "raw"])
def test_sizes(sizes: dict[str, Any], final: bool) -> None:
    sequences = ((41, 1, 1), (35, 4, (1, 3, 3, 2)))
    case = replace(Case("sizes", sequences=sequences, final=final, norm=not final), **sizes)
    assert_as_exact_as_reference(watched(SMALL), case.build())


@pytest.mark.slow
@pytest.mark.parametrize("plan", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_with_every_shape_of_step(case: Case, plan: LaunchConfig) -> None:
    for sequences in (((130, 1, 3), (64, 6, 3), *MIXED), MIXED[:1], MIXED[1:2], ((300, 1, 1), (5, 1, 3))):
        assert_as_exact_as_reference(watched(plan), replace(case, sequences=sequences).build())


@pytest.mark.parametrize("plan", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("decodes", [True, False], ids=["decodes", "chunks"])
def test_padding_changes_no_row(plan: LaunchConfig, decodes: bool) -> None:
    """Steps of padded sizes (`lragent/compile/gpu/packed_step.py`): tokens of no sequence, sequences without tokens."""
    sequences = tuple(MIXED[i] for i in ((0, 2) if decodes else (0, 1, 2)))
    call = replace(WIDE, sequences=sequences).build()
    expected = watched(plan)(call)
    tokens, more = expected.shape[0], 3
    query = torch.cat([call.query_THqDk, torch.full_like(call.query_THqDk[:1], torch.nan).repeat(5, 1, 1)])
    agent_ids = torch.cat([call.agent_ids_T, torch.zeros(5, dtype=torch.int64)])
    if decodes:
        query, agent_ids = query[: tokens + more], agent_ids[: tokens + more]
    table = call.page_table_SM
    longer = replace(
        call,
        query_THqDk=query,
        agent_ids_T=agent_ids,
        seq_starts=torch.cat([call.seq_starts, torch.tensor([tokens] * more)]),
        context_lens_S=torch.cat([call.context_lens_S, torch.zeros(more, dtype=torch.int64)]),
        page_table_SM=torch.cat([table, torch.zeros(more, table.shape[1], dtype=torch.int64)]),
    )
    assert torch.equal(watched(plan)(longer)[:tokens], expected)
