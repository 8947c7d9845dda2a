"""Compiles a lowered graph in segments: one AOTInductor package per kind of segment, and a plan of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from lragent.compat.torch import export_refused
from lragent.compile.aoti_package import write_package
from lragent.compile.export import dynamic_shapes, example_cache, example_step, tensors_of, value_of
from lragent.compile.segments.build import GraphSegment, build
from lragent.compile.segments.cut import cuts
from lragent.compile.segments.kinds import kinds, renumbered_sizes
from lragent.compile.segments.plan import WEIGHT, Call, SegmentPlan, write_plan
from lragent.compile.segments.shapes import CannotCut, forms
from lragent.files.checked_file import describe_file
from lragent.graph.quiet_export import without_exporter_noise
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import StepKind, input_sizes

# Named sizes of the example inputs that segments are exported with: all different, none 0 or 1.
_EXAMPLE = {"tokens": 6, "seqs": 2, "pages_per_seq": 4, "rows": 5, "pages": 3, "elements": 96}


def compile_segments(
    graph: fx.GraphModule, schema: CacheSchema, kv_dtype: torch.dtype, steps: StepKind, directory: Path
) -> Path:
    """Compiles one segment of each kind into `directory` and writes the plan.

    Args:
        graph: a lowered graph on the CPU.
        kv_dtype: dtype of the cache tensors.
        steps: kind of step that the graph serves.

    Returns:
        The path of the plan.

    Raises:
        CannotCut: the graph can't be compiled in segments; the message gives the reason.
        NoSpace: the directory of temporary files is full.
    """
    segments, result = segments_of(graph, schema, kv_dtype, steps)
    packages, calls = calls_of(segments)
    weights = tensors_of(graph)
    programs = [_export(segments[first], weights) for first in packages]
    for place, program in enumerate(programs):
        write_package(program, directory / _file(place))
    files = tuple(describe_file(directory, _file(place)) for place in range(len(packages)))
    return write_plan(SegmentPlan(files, calls, result), directory)


def calls_of(segments: Sequence[GraphSegment]) -> tuple[list[int], tuple[Call, ...]]:
    """Plans the calls of all segments.

    Returns:
        Indices of the segments to compile, one per kind, and a call per segment; `Call.package` indexes the former.
    """
    firsts = kinds(segments)
    packages = sorted(set(firsts))
    calls = (
        Call(packages.index(first), segment.inputs, segment.outputs)
        for first, segment in zip(firsts, segments, strict=True)
    )
    return packages, tuple(calls)


def segments_of(
    graph: fx.GraphModule, schema: CacheSchema, kv_dtype: torch.dtype, steps: StepKind = "any"
) -> tuple[list[GraphSegment], str]:
    """Splits a lowered graph into segments.

    Uses the first cut in which the segment of the last attention op equals an earlier segment. If there is no such
    cut, uses the first one.

    Returns:
        The segments in execution order, and the name of the value that is the graph's result.

    Raises:
        CannotCut: see `cuts` and `build`.
    """
    step, cache = example_step(len(schema.agents)).tensors(), example_cache(schema, kv_dtype).tensors()
    sizes = input_sizes(schema, steps)
    dtypes = [tensor.dtype for tensor in (*step, *cache)]
    found = forms(graph, {name: (sizes[name], dtype) for name, dtype in zip(sizes, dtypes, strict=True)})
    tried = []
    for cut in cuts(graph, found):
        segments, result = build(graph, cut, found)
        first = kinds(segments)
        tried.append((segments, result))
        if len(segments) > 2 and first[-2] < len(segments) - 2:
            return segments, result
    return tried[0]


def _export(segment: GraphSegment, weights: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    shapes = renumbered_sizes(segment.shapes)
    # Stored weights and values passed between segments are contiguous.
    inputs = tuple(
        weights[source.removeprefix(WEIGHT)].contiguous()
        if source.startswith(WEIGHT)
        else torch.zeros([value_of(size, _EXAMPLE) for size in shape], dtype=dtype)
        for source, shape, dtype in zip(segment.inputs, shapes, segment.dtypes, strict=True)
    )
    try:
        with without_exporter_noise(), torch.no_grad():
            return torch.export.export(segment.graph, inputs, dynamic_shapes=dynamic_shapes(shapes), strict=False)
    except export_refused() as error:
        raise CannotCut(f"a segment can't be exported: {str(error).splitlines()[0]}") from error


def _file(place: int) -> str:
    return f"segment-{place}.pt2"
