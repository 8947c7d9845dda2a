"""Attention ops become the implementation that was chosen for the target.

Before:                                    After (attention="torch"):
    o = flash_lora_attention(q, ...)           o = flash_lora_attention_torch(q, ...)

A norm over all heads is known to `reference` and `torch` only: such layers run `torch` whatever was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lragent.kernels import ops
from lragent.kernels.flash_lora_attention import inductor
from lragent.passes.base import Miss, Pass, PassContext, PassReport, PassState, calls, fetch

# Implementation name -> what the node calls; a plain function is traced into the graph when it is exported.
TARGETS: dict[str, Callable[..., Any]] = {
    "reference": ops.flash_lora_attention._opoverload,
    "torch": ops.flash_lora_attention_torch._opoverload,
    "cpp": torch.ops.lragent.flash_lora_attention_cpp.default,
    "triton": torch.ops.lragent.flash_lora_attention_triton.default,
    "inductor_decode": inductor.decode_aten,
    "inductor_prefill": inductor.prefill_aten,
}

# Implementations that know a norm over all heads.
WIDE_NORMS = ("reference", "torch")
NORM_WEIGHT = 16  # argument of the op


def _run(graph: fx.GraphModule, context: PassContext, state: PassState) -> PassReport:
    chosen = TARGETS[context.attention]
    nodes = list(calls(graph, torch.ops.lragent.flash_lora_attention.default))
    misses: list[Miss] = []
    for index, node in enumerate(nodes):
        node.target = chosen
        if context.attention not in WIDE_NORMS and _has_wide_norm(graph, node):
            node.target = TARGETS["torch"]
            misses.append(
                Miss(f"layer {index}", node.name, f"{context.attention} has no norm over all heads; runs torch")
            )
    return PassReport(len(nodes), tuple(misses))


def _has_wide_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    weight = node.args[NORM_WEIGHT]
    return isinstance(weight, fx.Node) and fetch(graph, weight).dim() == 2


LOWER_ATTENTION = Pass("lower_attention", _run)
