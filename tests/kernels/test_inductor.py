"""The aten lowering against the reference: eager, exported with dynamic sizes, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention import inductor, reference
from tests.kernels.attention_cases import CASES, Case, Kernel, assert_as_exact_as_reference

DECODES = ((17, 1, 1), (33, 1, 2), (1, 1, 0), (48, 1, 3))
PREFILLS = (((40, 23, 3),), ((17, 17, 1),), ((33, 1, 0),))


def _decode(case: Case) -> Case:
    return replace(case, sequences=DECODES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode(case: Case) -> None:
    assert_as_exact_as_reference(inductor.decode_aten, _decode(case).build())


@pytest.mark.parametrize("sequences", PREFILLS, ids=["chunk", "whole", "one token"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prefill(case: Case, sequences: tuple[tuple[int, int, int], ...]) -> None:
    assert_as_exact_as_reference(inductor.prefill_aten, replace(case, sequences=sequences).build())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_cache(dtype: torch.dtype) -> None:
    case = replace(CASES[0], cache_dtype=torch.bfloat16)
    assert_as_exact_as_reference(inductor.decode_aten, _decode(case).build(dtype))
    assert_as_exact_as_reference(inductor.prefill_aten, replace(case, sequences=PREFILLS[0]).build(dtype))


class _Step(torch.nn.Module):
    """One attention call as a module: tensors that vary are inputs, the rest are constants, as in a lowered graph."""

    def __init__(self, kernel: Kernel, call: AttentionCall) -> None:
        super().__init__()
        self.kernel = kernel
        self.call = call

    def forward(self, *varying: Tensor) -> Tensor:
        return self.kernel(replace(self.call, **dict(zip(VARYING, varying, strict=True))))


VARYING = (
    "query_THqDk", "k_cache", "v_cache", "agent_ids_T", "seq_starts", "context_lens_S", "page_table_SM",
    "lr_k", "lr_k_table", "lr_v", "lr_v_table",
)  # fmt: skip


def _shapes(name: str, decode: bool) -> dict[int, Any] | None:
    dim = torch.export.Dim
    tokens, pages = dim("tokens", min=1, max=1 << 20), dim("pages", min=2, max=1 << 30)
    seqs = tokens if decode else 1
    return {
        "query_THqDk": {0: tokens},
        "agent_ids_T": {0: tokens},
        "k_cache": {0: pages},
        "v_cache": {0: pages},
        "seq_starts": {0: tokens + 1} if decode else None,
        "context_lens_S": {0: seqs} if decode else None,
        "page_table_SM": {0: seqs, 1: dim("pages_per_seq", min=1, max=1 << 20)}
        if decode
        else {1: dim("pages_per_seq", min=1)},
        "lr_k": {0: dim("k_elements", min=2, max=1 << 40)},
        "lr_v": {0: dim("v_elements", min=2, max=1 << 40)},
    }.get(name)


def _exported(kernel: Kernel, call: AttentionCall, decode: bool) -> torch.export.ExportedProgram:
    shapes = tuple(_shapes(name, decode) for name in VARYING)
    inputs = _varying(call)
    return torch.export.export(_Step(kernel, call), inputs, dynamic_shapes={"varying": shapes}, strict=False)


def _traced(decode: bool) -> tuple[Kernel, list[AttentionCall]]:
    """A kernel and calls of many sizes for it; the first one is to be traced."""
    case = replace(next(c for c in CASES if c.name == "everything"), ranks=(4, 2, 6), sinks=False)
    decodes = (DECODES, ((21, 1, 2),), ((48, 1, 1), (2, 1, 3)))
    prefills = (PREFILLS[0], ((40, 31, 2),), ((1, 1, 1),), ((30, 1, 3),))
    calls = [replace(case, sequences=sequences).build() for sequences in (decodes if decode else prefills)]
    of_all = [replace(calls[0], **dict(zip(VARYING, _varying(call), strict=True))) for call in calls]
    return inductor.decode_aten if decode else inductor.prefill_aten, of_all


def _varying(call: AttentionCall) -> tuple[Tensor, ...]:
    return tuple(getattr(call, name) for name in VARYING)


def _check(run: Callable[..., Tensor], calls: list[AttentionCall]) -> None:
    for call in calls:
        found = run(*_varying(call))
        torch.testing.assert_close(found, reference.flash_lora_attention(call), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_exported_with_dynamic_sizes(decode: bool) -> None:
    kernel, calls = _traced(decode)
    _check(_exported(kernel, calls[0], decode).module(), calls)


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    kernel, calls = _traced(decode=True)
    package = str(tmp_path / "attention.pt2")
    torch._inductor.aoti_compile_and_package(
        _exported(kernel, calls[0], decode=True),
        package_path=package,
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    _check(torch._inductor.aoti_load_package(package), calls)
