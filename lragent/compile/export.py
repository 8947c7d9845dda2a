"""Exports a lowered graph as an `ExportedProgram` with dynamic shapes, the form that AOTInductor compiles.

Legend: T = packed tokens of a step, S = sequences, M = pages per sequence, R = logits rows. The page count and the LR
lengths depend on the cache memory set at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lragent.graph.quiet_export import without_exporter_noise
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import (
    ELEMENTS,
    PAGE_SIZE,
    CacheTensors,
    Size,
    StepInputs,
    StepKind,
    input_sizes,
)

CPU = torch.device("cpu")
# Smallest and largest value of each named size.
_LIMITS = {
    "tokens": (1, 1 << 20),
    "seqs": (1, 1 << 16),
    "pages_per_seq": (1, 1 << 20),
    "rows": (1, 1 << 20),
    "pages": (2, 1 << 30),
}
_ELEMENT_LIMITS = (2, 1 << 40)


def example_step(agents: int, seqs: int = 2, tokens: int = 3) -> StepInputs:
    """Builds a step of `seqs` sequences with `tokens` tokens each.

    The default sizes differ from each other and from 0 and 1, so that export doesn't merge or specialise dimensions.
    """
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
    """A cache of three pages per stream, filled with zeros."""
    pages = 3
    return CacheTensors(
        k_base=tuple(torch.zeros(pages, b.kv_heads, PAGE_SIZE, b.k_dim, dtype=dtype) for b in schema.base),
        v_base=tuple(torch.zeros(pages, b.kv_heads, PAGE_SIZE, b.v_dim, dtype=dtype) for b in schema.base),
        low_rank=tuple(torch.zeros(s.elements("per_agent", pages, PAGE_SIZE), dtype=dtype) for s in schema.low_rank),
        lr_directories=tuple(s.lr_directory("per_agent", pages, PAGE_SIZE) for s in schema.low_rank),
    )


def dynamic_shapes(shapes: Iterable[tuple[Size, ...]]) -> tuple[dict[int, Any], ...]:
    """Builds `torch.export`'s dynamic shapes: a `Dim` per named size, with a minimum of 1 (pages, elements: 2)."""
    roots: dict[str, Any] = {}

    def dim(size: str) -> Any:
        name, _, more = size.partition(" + ")
        low, high = _ELEMENT_LIMITS if name.startswith(ELEMENTS) else _LIMITS[name]
        root = roots.setdefault(name, torch.export.Dim(name, min=low, max=high))
        return root + int(more) if more else root

    return tuple({i: dim(size) for i, size in enumerate(shape) if isinstance(size, str)} for shape in shapes)


def value_of(size: Size, sizes: Mapping[str, int]) -> int:
    """Evaluates a size.

    Args:
        sizes: values of "tokens", "seqs", ... and "elements". "elements_j" evaluates to elements + j * tokens, so that
            every LR tensor gets a different length.
    """
    if isinstance(size, int):
        return size
    name, _, more = size.partition(" + ")
    if name.startswith(ELEMENTS):
        return sizes["elements"] + int(name.removeprefix(ELEMENTS)) * sizes["tokens"]
    return sizes[name] + int(more or 0)


def export_graph(
    graph: fx.GraphModule,
    schema: CacheSchema,
    kv_dtype: torch.dtype,
    steps: StepKind = "any",
    device: torch.device = CPU,
) -> torch.export.ExportedProgram:
    """Exports a graph with the dynamic shapes of `input_sizes`.

    Args:
        graph: a lowered graph whose weights are on `device`.
        kv_dtype: dtype of the cache tensors.
        steps: kind of step that the exported program accepts.
    """
    shape = {"any": (2, 3), "decode": (3, 1), "prefill": (1, 3)}[steps]
    inputs = (*example_step(len(schema.agents), *shape).tensors(), *example_cache(schema, kv_dtype).tensors())
    shapes = dynamic_shapes(input_sizes(schema, steps).values())
    with without_exporter_noise(), torch.no_grad():
        on_device = tuple(tensor.to(device) for tensor in inputs)
        return torch.export.export(graph, on_device, dynamic_shapes=shapes, strict=False)


def tensors_of(graph: torch.nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers by name. A tied tensor appears under each of its names."""
    return {
        **dict(graph.named_parameters(remove_duplicate=False)),
        **dict(graph.named_buffers(remove_duplicate=False)),
    }
