"""The table of all attention implementations and their properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lragent.kernels import cpp_library, ops, triton_library
from lragent.kernels.attention_call import attention_function, attention_op
from lragent.kernels.flash_lora_attention import inductor, torch_paged
from lragent.program.step import StepKind


@dataclass(frozen=True)
class AttentionGraph:
    """One lowered graph of an implementation.

    Args:
        target: the op or function that attention nodes call; a plain function is traced into the graph at export.
        steps: the kind of steps that the graph can run.
    """

    name: str
    target: Callable[..., Any]
    steps: StepKind = "any"


@dataclass(frozen=True)
class AttentionImpl:
    """One attention implementation.

    Args:
        devices: device types that it runs on.
        graphs: one graph for any step, or one for decode and one for prefill; `lragent.compile.split_step` then
            splits a mixed step.
        wide_norms: it computes a norm over all heads. If False, layers with such a norm run `FALLBACK`.
        cuda_graph_safe: the host reads no values from the device, so a step can be captured as a CUDA graph.
        fuses_linears: `load` also registers a kernel for `routed_linears`.
        load: registers its kernels with PyTorch, or raises CompilerMissing or RequestError. None: there is nothing to
            load.
        preferred: "auto" chooses it on its devices if it can be loaded.
    """

    name: str
    devices: tuple[str, ...]
    graphs: tuple[AttentionGraph, ...]
    wide_norms: bool = False
    cuda_graph_safe: bool = False
    fuses_linears: bool = False
    load: Callable[[], None] | None = None
    preferred: bool = False


_ALL = (
    AttentionImpl(
        "reference",
        devices=("cpu", "cuda"),
        graphs=(AttentionGraph("reference", ops.flash_lora_attention),),
        wide_norms=True,
    ),
    AttentionImpl(
        "torch",
        devices=("cpu", "cuda"),
        graphs=(AttentionGraph("torch", attention_op("flash_lora_attention_torch", torch_paged.flash_lora_attention)),),
        wide_norms=True,
    ),
    AttentionImpl(
        "inductor",
        devices=("cpu", "cuda"),
        graphs=(
            AttentionGraph("inductor_decode", attention_function(inductor.decode_aten), "decode"),
            AttentionGraph("inductor_prefill", attention_function(inductor.prefill_aten), "prefill"),
        ),
    ),
    AttentionImpl(
        "cpp",
        devices=("cpu",),
        graphs=(AttentionGraph("cpp", cpp_library.ATTENTION),),
        fuses_linears=True,
        load=cpp_library.load,
        preferred=True,
    ),
    AttentionImpl(
        "triton",
        devices=("cuda",),
        graphs=(AttentionGraph("triton", triton_library.ATTENTION),),
        cuda_graph_safe=True,
        load=triton_library.load,
        preferred=True,
    ),
)

# Implementation by name. Error messages list them in this order.
IMPLEMENTATIONS: dict[str, AttentionImpl] = {impl.name: impl for impl in _ALL}
# Graph by its name, and the graph's implementation by the same name.
GRAPHS: dict[str, AttentionGraph] = {graph.name: graph for impl in _ALL for graph in impl.graphs}
IMPLEMENTATION_OF: dict[str, AttentionImpl] = {graph.name: impl for impl in _ALL for graph in impl.graphs}
# Runs the layers that the chosen implementation can't run. It supports every device and every norm.
FALLBACK = "torch"
