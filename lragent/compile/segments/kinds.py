"""Which segments are the same but for their weights and cache tensors, so that one package serves them all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lragent.compile.segments.build import Segment
from lragent.program.step import Size


def kinds(segments: Sequence[Segment]) -> list[int]:
    """For each segment, the index of the first one that is the same."""
    first: dict[str, int] = {}
    return [first.setdefault(signature(segment), index) for index, segment in enumerate(segments)]


def signature(segment: Segment) -> str:
    """Ops, arguments, and dtypes and shapes of the inputs, in order; equal signatures compile to equal packages."""
    places = {node: f"%{place}" for place, node in enumerate(segment.graph.graph.nodes)}
    lines = [f"{dtype} {shape}" for dtype, shape in zip(segment.dtypes, own_sizes(segment.shapes), strict=True)]
    for node in segment.graph.graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda used: _Named(places[used]))
        target = "" if node.op == "placeholder" else _name(node.target)
        lines.append(f"{node.op} {target} {args}")
    return "\n".join(lines)


def own_sizes(shapes: Sequence[tuple[Size, ...]]) -> list[tuple[Size, ...]]:
    """Shapes in which sizes of single cache tensors ("elements_7") are counted from 0 on."""
    seen: dict[str, str] = {}

    def own(size: Size) -> Size:
        if not isinstance(size, str) or "_" not in size:
            return size
        return seen.setdefault(size, f"{size.partition('_')[0]}_{len(seen)}")

    return [tuple(own(size) for size in shape) for shape in shapes]


class _Named(str):
    """Prints as it is."""

    __repr__ = str.__str__


def _name(target: object) -> str:
    if callable(target) and hasattr(target, "__qualname__"):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)
