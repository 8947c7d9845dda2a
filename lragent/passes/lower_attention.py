"""Attention ops become the implementation that was chosen for the target.

Before:                                    After (attention="torch"):
    o = flash_lora_attention(q, ...)           o = flash_lora_attention_torch(q, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lragent.kernels import ops
from lragent.kernels.flash_lora_attention import inductor
from lragent.passes.base import Pass, PassContext, PassReport, PassState, calls

# Implementation name -> what the node calls; a plain function is traced into the graph when it is exported.
TARGETS: dict[str, Callable[..., Any]] = {
    "reference": ops.flash_lora_attention._opoverload,
    "torch": ops.flash_lora_attention_torch._opoverload,
    "cpp": torch.ops.lragent.flash_lora_attention_cpp.default,
    "triton": torch.ops.lragent.flash_lora_attention_triton.default,
    "inductor_decode": inductor.decode_aten,
    "inductor_prefill": inductor.prefill_aten,
}


def _run(graph: fx.GraphModule, context: PassContext, state: PassState) -> PassReport:
    chosen = TARGETS[context.attention]
    nodes = list(calls(graph, torch.ops.lragent.flash_lora_attention.default))
    for node in nodes:
        node.target = chosen
    return PassReport(len(nodes))


LOWER_ATTENTION = Pass("lower_attention", _run)
