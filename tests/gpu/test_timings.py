"""Prints times of decode and prefill (`make test-gpu PYTEST_ARGS=-s`); fails where Triton loses to plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lragent.kernels.flash_lora_attention import torch_paged
from tests.gpu.test_numerics import on_device, triton_op
from tests.kernels.attention_cases import Case

pytestmark = pytest.mark.gpu

STEPS = {
    "decode 32 x 2048": tuple((2048, 1, 1 + i % 3) for i in range(32)),
    "decode 1 x 8192": ((8192, 1, 1),),
    "prefill 1024 of 4096": ((4096, 1024, 1),),
}


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of twenty calls after three."""
    times: list[float] = []
    for i in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("step", STEPS)
def test_step(step: str, rank: int) -> None:
    case = Case(
        step, sequences=STEPS[step], heads=8, group=4, k_dim=128, v_dim=128, ranks=(rank,) * 3,
        cache_dtype=torch.bfloat16,
    )  # fmt: skip
    call = on_device(case.build(torch.bfloat16))
    tokens = sum(length for length, _, _ in case.sequences)
    read = tokens * (case.heads * (case.k_dim + case.v_dim) + 2 * rank) * 2
    ours, plain = (milliseconds(lambda op=op: op(call)) for op in (triton_op, torch_paged.flash_lora_attention))
    found = f"{ours:.3f} ms ({read / ours / 1e6:.0f} GB/s), torch {plain:.3f} ms"
    print(f"\n{torch.cuda.get_device_name()}, {step}, r {rank}: {found}")
    assert ours < plain
