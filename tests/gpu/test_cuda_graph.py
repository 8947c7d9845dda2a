"""A captured call follows its inputs: nothing in the launch depends on the values that were there at capture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lragent.kernels.flash_lora_attention import reference
from tests.gpu.test_numerics import on_device, triton_op
from tests.kernels.attention_cases import CASES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 7], ids=["decodes", "chunks"])
def test_replay_with_other_agents_and_lengths(rows: int) -> None:
    static = on_device(replace(CASES[0], sequences=((90, rows, 1), (60, rows, 3))).build())
    triton_op(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_op(static)
    graph.replay()
    torch.testing.assert_close(out, reference.flash_lora_attention(static), rtol=1e-4, atol=1e-5)
    static.context_lens_S.sub_(5)
    static.agent_ids_T.fill_(2)
    graph.replay()
    torch.testing.assert_close(out, reference.flash_lora_attention(static), rtol=1e-4, atol=1e-5)
