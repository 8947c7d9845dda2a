"""Stage 4a: a transformed graph as an `ExportedProgram` with dynamic shapes, with or without its weights.

The exported form is what AOTInductor compiles and what an artifact stores. Legend: T = packed tokens of a step, S =
sequences, M = page table columns, R = logits rows; page count and LR lengths depend on the memory given at load.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lragent.graph.plain_graph import plain_graph
from lragent.graph.quiet_export import without_exporter_noise
from lragent.kernels import ops  # registers the ops that exported programs call
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import (
    PAGE_SIZE,
    CacheTensors,
    Size,
    StepInputs,
    StepKind,
    input_sizes,
)

CPU = torch.device("cpu")
_LIMITS = {
    "tokens": (1, 1 << 20),
    "seqs": (1, 1 << 16),
    "columns": (1, 1 << 20),
    "rows": (1, 1 << 20),
    "pages": (2, 1 << 30),
    "elements": (2, 1 << 40),
}
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
        lr_directories=tuple(s.lr_directory("per_agent", pages, PAGE_SIZE) for s in schema.low_rank),
    )


def dynamic_shapes(shapes: Iterable[tuple[Size, ...]]) -> tuple[dict[int, Any], ...]:
    """What `torch.export` is to take as dynamic: named sizes, from 1 on (pages and elements: from 2)."""
    roots: dict[str, Any] = {}

    def dim(size: str) -> Any:
        name, _, more = size.partition(" + ")
        low, high = next(limits for stem, limits in _LIMITS.items() if name.startswith(stem))
        root = roots.setdefault(name, torch.export.Dim(name, min=low, max=high))
        return root + int(more) if more else root

    return tuple({i: dim(size) for i, size in enumerate(shape) if isinstance(size, str)} for shape in shapes)


def value_of(size: Size, sizes: Mapping[str, int]) -> int:
    """A size as a number.

    Args:
        sizes: a number for "tokens", "seqs", ...; of "elements_0", "elements_1", ... each gets one of its own.
    """
    if isinstance(size, int):
        return size
    name, _, more = size.partition(" + ")
    stem, _, number = name.partition("_")
    return sizes[stem] + int(number or 0) * sizes["tokens"] + int(more or 0)


def export_graph(
    graph: fx.GraphModule,
    schema: CacheSchema,
    kv_dtype: torch.dtype,
    steps: StepKind = "any",
    device: torch.device = CPU,
) -> torch.export.ExportedProgram:
    """Exports a transformed graph, whose weights are on `device`; sizes are those of `input_sizes`."""
    shape = {"any": (2, 3), "decode": (3, 1), "prefill": (1, 3)}[steps]
    inputs = (*example_step(len(schema.agents), *shape).tensors(), *example_cache(schema, kv_dtype).tensors())
    shapes = dynamic_shapes(input_sizes(schema, steps).values())
    with without_exporter_noise(), torch.no_grad():
        there = tuple(tensor.to(device) for tensor in inputs)
        return torch.export.export(graph, there, dynamic_shapes=shapes, strict=False)


def tensors_of(graph: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; names of one tied tensor all appear."""
    return {
        **dict(graph.named_parameters(remove_duplicate=False)),
        **dict(graph.named_buffers(remove_duplicate=False)),
    }


def save_without_weights(program: torch.export.ExportedProgram, path: Path) -> None:
    """Saves the graph with one stored number in place of each weight.

    Raises:
        OSError: the file can't be written.
    """
    weights, constants, inputs = program.state_dict, program.constants, program.example_inputs
    program._state_dict = {name: _hollow(t) for name, t in weights.items()}
    program._constants = {name: _hollow(t) for name, t in constants.items()}
    program._example_inputs = None  # they would be stored pickled
    try:
        with without_exporter_noise():
            archive = io.BytesIO()  # PyTorch's own writer ends the process if the disk is full
            torch.export.save(program, archive)
    finally:
        program._state_dict, program._constants, program._example_inputs = weights, constants, inputs
    path.write_bytes(archive.getbuffer())


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
    put_weights(graph, weights)
    return graph


def put_weights(graph: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
    """Makes a graph read `weights` in place of those of the same names; names of one tensor stay tied."""
    parameters: dict[int, torch.nn.Parameter] = {}
    for name in tensors_of(graph):
        owner_name, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(owner_name)
        weight = weights[name]
        if leaf not in owner._parameters:
            owner._buffers[leaf] = weight
            continue
        if id(weight) not in parameters:
            parameters[id(weight)] = torch.nn.Parameter(weight, requires_grad=False)
        owner._parameters[leaf] = parameters[id(weight)]
