"""Compiles a lowered graph in segments: one AOTInductor package for all that are the same, and a plan of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._dynamo.exc import UserError as ExportRefused

from lragent.compile.aoti_package import write_package
from lragent.compile.export import dynamic_shapes, example_cache, example_step, tensors_of, value_of
from lragent.compile.segments.build import Segment, build
from lragent.compile.segments.cut import cuts
from lragent.compile.segments.kinds import kinds, own_sizes
from lragent.compile.segments.plan import WEIGHT, Call, Plan, write_plan
from lragent.compile.segments.shapes import CannotCut, forms
from lragent.files.checked_file import describe_file
from lragent.graph.quiet_export import without_exporter_noise
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import StepKind, input_sizes

# Named sizes in the example from which a segment is exported; no two are the same, and none is 0 or 1.
_EXAMPLE = {"tokens": 6, "seqs": 2, "columns": 4, "rows": 5, "pages": 3, "elements": 96}


def compile_segments(
    graph: fx.GraphModule, schema: CacheSchema, kv_dtype: torch.dtype, steps: StepKind, directory: Path
) -> Path:
    """Compiles each kind of segment into `directory`; returns the path of the plan.

    Raises:
        CannotCut: the graph can't be compiled in segments; says why.
    """
    segments, result = segments_of(graph, schema, kv_dtype, steps)
    packages, calls = calls_of(segments)
    weights = tensors_of(graph)
    programs = [_export(segments[first], weights) for first in packages]
    for place, program in enumerate(programs):
        write_package(program, directory / _file(place))
    files = tuple(describe_file(directory, _file(place)) for place in range(len(packages)))
    return write_plan(Plan(files, calls, result), directory)


def calls_of(segments: Sequence[Segment]) -> tuple[list[int], tuple[Call, ...]]:
    """Indices of the segments that are compiled, one of each kind, and the calls of all, by place among these."""
    firsts = kinds(segments)
    packages = sorted(set(firsts))
    calls = (
        Call(packages.index(first), segment.inputs, segment.outputs)
        for first, segment in zip(firsts, segments, strict=True)
    )
    return packages, tuple(calls)


def segments_of(
    graph: fx.GraphModule, schema: CacheSchema, kv_dtype: torch.dtype, steps: StepKind = "any"
) -> tuple[list[Segment], str]:
    """The segments of a lowered graph in order, and the value that is its result.

    Of the ways to cut it, it is the first in which the last attention op's segment is the same as an earlier one, or
    else the first.

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


def _export(segment: Segment, weights: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    shapes = own_sizes(segment.shapes)
    # Weights are contiguous where they are stored, and so is what one segment gives another.
    inputs = tuple(
        weights[source.removeprefix(WEIGHT)].contiguous()
        if source.startswith(WEIGHT)
        else torch.zeros([value_of(size, _EXAMPLE) for size in shape], dtype=dtype)
        for source, shape, dtype in zip(segment.inputs, shapes, segment.dtypes, strict=True)
    )
    try:
        with without_exporter_noise(), torch.no_grad():
            return torch.export.export(segment.graph, inputs, dynamic_shapes=dynamic_shapes(shapes), strict=False)
    except ExportRefused as error:
        raise CannotCut(f"a segment can't be exported: {str(error).splitlines()[0]}") from error


def _file(place: int) -> str:
    return f"segment-{place}.pt2"
