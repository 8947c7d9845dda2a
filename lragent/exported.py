"""Stage 4a: a transformed graph as an `ExportedProgram` with dynamic shapes, with or without its weights.

The exported form is what AOTInductor compiles and what an artifact stores. Legend: T = packed tokens of a step, S =
sequences, M = page table columns, R = logits rows; page count and LR lengths depend on the memory given at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lragent.exporter_noise import without_exporter_noise
from lragent.kernels import ops  # registers the ops that exported programs call
from lragent.kernels.cache_schema import CacheSchema
from lragent.kernels.step import CacheTensors, StepInputs
from lragent.plain_graph import plain_graph

PAGE_SIZE = 32
StepKind = Literal["any", "decode", "prefill"]
assert ops.flash_lora_attention is not None


def example_step(agents: int, seqs: int = 2, tokens: int = 3) -> StepInputs:
    """A step of some sequences with some tokens each: sizes of the usual one differ from each other, and from 0, 1."""
    slots = torch.tensor([PAGE_SIZE * (1 + s) + t for s in range(seqs) for t in range(tokens)])
    return StepInputs(
        token_ids=torch.zeros_like(slots),
        positions=slots % PAGE_SIZE,
        agent_ids=torch.zeros_like(slots),
        logits_rows=torch.arange(2),
        base_slots=slots,
        lr_slots=slots.repeat(agents, 1),
        seq_starts=torch.arange(seqs + 1) * tokens,
        context_lens=torch.full((seqs,), tokens),
        page_table=torch.tensor([[1 + s, 0, 0, 0] for s in range(seqs)]),
    )


def example_cache(schema: CacheSchema, dtype: torch.dtype) -> CacheTensors:
    """Three pages of every stream."""
    pages = 3
    return CacheTensors(
        k_base=tuple(torch.zeros(pages, b.kv_heads, PAGE_SIZE, b.k_dim, dtype=dtype) for b in schema.base),
        v_base=tuple(torch.zeros(pages, b.kv_heads, PAGE_SIZE, b.v_dim, dtype=dtype) for b in schema.base),
        low_rank=tuple(torch.zeros(s.elements("per_agent", pages, PAGE_SIZE), dtype=dtype) for s in schema.low_rank),
        tables=tuple(s.table("per_agent", pages, PAGE_SIZE) for s in schema.low_rank),
    )


def export_graph(
    graph: fx.GraphModule, schema: CacheSchema, kv_dtype: torch.dtype, steps: StepKind = "any"
) -> torch.export.ExportedProgram:
    """Exports a transformed graph; every size that a step or the cache memory decides is dynamic from 1 (pages: 2).

    Args:
        steps: "decode": every sequence has one token; "prefill": there is one sequence.
    """
    dim = torch.export.Dim
    tokens = dim("tokens", min=1, max=1 << 20)
    seqs = {"any": dim("seqs", min=1, max=1 << 16), "decode": tokens, "prefill": None}[steps]
    columns, rows = dim("columns", min=1, max=1 << 20), dim("rows", min=1, max=1 << 20)
    pages = dim("pages", min=2, max=1 << 30)
    step_shapes: list[Any] = [
        {0: tokens},
        {0: tokens},
        {0: tokens},
        {0: rows},
        {0: tokens},
        {1: tokens},
        {0: seqs + 1 if seqs is not None else None},
        {0: seqs},
        {0: seqs, 1: columns},
    ]
    base_shapes: list[Any] = [{0: pages} for _ in range(2 * len(schema.base))]
    low_rank: list[Any] = [{0: dim(f"elements_{j}", min=2, max=1 << 40)} for j in range(len(schema.low_rank))]
    tables: list[Any] = [None for _ in schema.low_rank]
    shape = {"any": (2, 3), "decode": (3, 1), "prefill": (1, 3)}[steps]
    inputs = (*example_step(len(schema.agents), *shape).tensors(), *example_cache(schema, kv_dtype).tensors())
    with without_exporter_noise(), torch.no_grad():
        return torch.export.export(
            graph, inputs, dynamic_shapes=(*step_shapes, *base_shapes, *low_rank, *tables), strict=False
        )


def tensors_of(graph: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; names of one tied tensor all appear."""
    return {
        **dict(graph.named_parameters(remove_duplicate=False)),
        **dict(graph.named_buffers(remove_duplicate=False)),
    }


def save_without_weights(program: torch.export.ExportedProgram, path: Path) -> None:
    """Saves the graph with one stored number in place of each weight."""
    weights, constants, inputs = program.state_dict, program.constants, program.example_inputs
    program._state_dict = {name: _hollow(t) for name, t in weights.items()}
    program._constants = {name: _hollow(t) for name, t in constants.items()}
    program._example_inputs = None  # they would be stored pickled
    try:
        with without_exporter_noise():
            torch.export.save(program, path)
    finally:
        program._state_dict, program._constants, program._example_inputs = weights, constants, inputs


def _hollow(value: Any) -> Any:
    """A tensor of the same shape and kind over a single stored number."""
    if not isinstance(value, Tensor):
        return value
    hollow = torch.zeros((), dtype=value.dtype).expand(value.shape)
    return torch.nn.Parameter(hollow, requires_grad=False) if isinstance(value, torch.nn.Parameter) else hollow


def load_with_weights(path: Path, weights: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph saved by `save_without_weights`, reading `weights` in place (they are not copied)."""
    with without_exporter_noise():
        graph = plain_graph(torch.export.load(path))
    for name in tensors_of(graph):
        owner_name, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(owner_name)
        weight = weights[name]
        if leaf in owner._parameters:
            owner._parameters[leaf] = torch.nn.Parameter(weight, requires_grad=False)
        else:
            owner._buffers[leaf] = weight
    return graph
