"""Attention ops become the implementation that was chosen for the target.

Before:                                    After (attention="torch"):
    o = flash_lora_attention(q, ...)           o = flash_lora_attention_torch(q, ...)

A norm over all heads is known to `reference` and `torch` only: such layers run `torch` whatever was chosen, and the
pass reports each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lragent.errors import Miss
from lragent.graph.fx_tools import calls, fetch
from lragent.graph.passes import Pass, PassReport
from lragent.kernels import ops
from lragent.kernels.dispatch import FALLBACK
from lragent.kernels.flash_lora_attention import inductor
from lragent.passes.contract import LowerContext

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


def _run(graph: fx.GraphModule, context: LowerContext) -> PassReport:
    misses = fallback_layers(graph, context.attention)
    missed = {miss.node for miss in misses}
    nodes = _attention_nodes(graph)
    for node in nodes:
        node.target = TARGETS[FALLBACK if node.name in missed else context.attention]
    return PassReport(len(nodes), misses)


def fallback_layers(graph: fx.GraphModule, attention: str) -> tuple[Miss, ...]:
    """Layers of a rewritten graph, not yet lowered, that run `FALLBACK` where `attention` is chosen."""
    if attention in WIDE_NORMS:
        return ()
    return tuple(
        Miss(f"layer {index}", node.name, f"{attention} has no norm over all heads; runs {FALLBACK}")
        for index, node in enumerate(_attention_nodes(graph))
        if _has_wide_norm(graph, node)
    )


def _attention_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return list(calls(graph, torch.ops.lragent.flash_lora_attention.default))


def _has_wide_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    weight = node.args[NORM_WEIGHT]
    return isinstance(weight, fx.Node) and fetch(graph, weight).dim() == 2


LOWER_ATTENTION = Pass("lower_attention", _run)
