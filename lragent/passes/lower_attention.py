"""Attention ops become the implementation that was chosen for the target.

Before:                                    After (attention="torch"):
    o = flash_lora_attention(q, ...)           o = flash_lora_attention_torch(q, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from lragent.kernels.dispatch import implementation
from lragent.passes.base import Pass, PassContext, PassReport, PassState, calls


def _run(graph: fx.GraphModule, context: PassContext, state: PassState) -> PassReport:
    chosen = implementation(context.attention)
    nodes = list(calls(graph, torch.ops.lragent.flash_lora_attention.default))
    for node in nodes:
        node.target = chosen
    return PassReport(len(nodes))


LOWER_ATTENTION = Pass("lower_attention", _run)
