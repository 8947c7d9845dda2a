"""Groups segments that differ only in their weights and cache tensors. One package serves each group (kind)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lragent.compile.segments.build import GraphSegment
from lragent.program.step import ELEMENTS, Size


def kinds(segments: Sequence[GraphSegment]) -> list[int]:
    """Returns, for each segment, the index of the first segment of its kind."""
    first: dict[str, int] = {}
    return [first.setdefault(signature(segment), index) for index, segment in enumerate(segments)]


def signature(segment: GraphSegment) -> str:
    """Text of a segment's ops, arguments, and input dtypes and shapes. Equal signatures compile to equal packages."""
    places = {node: f"%{place}" for place, node in enumerate(segment.graph.graph.nodes)}
    lines = [f"{dtype} {shape}" for dtype, shape in zip(segment.dtypes, renumbered_sizes(segment.shapes), strict=True)]
    for node in segment.graph.graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda used: _Named(places[used]))
        target = "" if node.op == "placeholder" else _name(node.target)
        lines.append(f"{node.op} {target} {args}")
    return "\n".join(lines)


def renumbered_sizes(shapes: Sequence[tuple[Size, ...]]) -> list[tuple[Size, ...]]:
    """Renumbers the lengths of LR tensors ("elements_7") from 0 within a segment, so that segments can be compared."""
    seen: dict[str, str] = {}

    def renumbered(size: Size) -> Size:
        if not isinstance(size, str) or not size.startswith(ELEMENTS):
            return size
        return seen.setdefault(size, f"{ELEMENTS}{len(seen)}")

    return [tuple(renumbered(size) for size in shape) for shape in shapes]


class _Named(str):
    """A string whose repr has no quotes."""

    __repr__ = str.__str__


def _name(target: object) -> str:
    if callable(target) and hasattr(target, "__qualname__"):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)
