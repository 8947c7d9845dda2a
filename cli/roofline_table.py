"""The facts and the table that `lragent roofline` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .quantities import show_bytes

if TYPE_CHECKING:
    from lragent.reports.roofline import Gpu, Load, ModelShape, StepEstimate

NOTE = (
    "An estimate, not a measurement: weights and cache pass through memory once, in 16 bits a number, at the speed of "
    "the data sheet; attention's own arithmetic, launches and everything else are left out."
)


def shape_of(source: Path, agents: int, rank: int) -> ModelShape:
    """The shape of an artifact, or of a model directory with `agents` adapters of one rank on every K and V."""
    from lragent.reports.roofline import shape_of_artifact, shape_of_model

    return shape_of_model(source, agents, rank) if (source / "config.json").is_file() else shape_of_artifact(source)


def estimate_facts(name: str, gpu: Gpu, shape: ModelShape, load: Load) -> dict[str, Any]:
    """Facts about GPU, model and load that belong to the estimates."""
    return {
        "gpu": name,
        "gb_per_second": gpu.bandwidth / 1e9,
        "weights": shape.weights,
        "agents": len(shape.schema.agents),
        "trajectories": load.trajectories,
        "decoding": load.decoding,
        "context": load.context,
    }


def estimate_table(estimates: Sequence[StepEstimate], facts: dict[str, Any]) -> Table:
    """One row a scheme."""
    title = (
        f"estimated decode step, {facts['gpu']} at {facts['gb_per_second']:.0f} GB/s: {facts['trajectories']} "
        f"trajectories of {facts['context']} tokens, {facts['decoding']} of {facts['agents']} agents decode in each"
    )
    table = Table(title=title, caption=NOTE)
    for heading in ("scheme", "cache held", "fits", "cache read", "step", "read once a trajectory", "step then"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for row in estimates:
        table.add_row(
            row.sharing,
            show_bytes(row.held),
            "yes" if row.fits else "no",
            show_bytes(row.read),
            f"{row.seconds * 1e3:.2f} ms",
            show_bytes(row.read_once),
            f"{row.seconds_once * 1e3:.2f} ms",
        )
    return table
