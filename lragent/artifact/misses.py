"""Lists the places where passes did not match, by layout, for reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from lragent.errors import Miss


class Missing(Protocol):
    """A rewritten program, or its entry in a manifest; see `lragent.passes.pipeline.Transformed`."""

    @property
    def misses(self) -> tuple[Miss, ...]: ...
    @property
    def fallbacks(self) -> Mapping[str, tuple[Miss, ...]]: ...


def misses_by_layout(
    programs: Iterable[tuple[str, Missing]], refused: tuple[Miss, ...], graph_names: Collection[str] | None = None
) -> dict[str, tuple[Miss, ...]]:
    """Layout -> every miss of its program; layouts without misses are left out.

    Args:
        programs: pairs of layout and program.
        refused: every place for which split layout was refused; empty if it was not.
        graph_names: graphs whose fallback layers are listed (`lragent.kernels.dispatch.graphs`); None: all.
    """
    found = {
        layout: (
            *program.misses,
            *(
                miss
                for name, layers in program.fallbacks.items()
                if graph_names is None or name in graph_names
                for miss in layers
            ),
        )
        for layout, program in programs
    }
    if refused:
        found["split"] = refused
    return {layout: misses for layout, misses in found.items() if misses}
