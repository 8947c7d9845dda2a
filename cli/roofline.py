"""`lragent roofline`: estimates the time of a decode step on a GPU under chosen sharing schemes; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lragent.files.user_path import user_path

from .engine_options import ALL_SCHEMES, AsJson, Schemes, parse_schemes
from .output import print_json, results
from .roofline_table import NOTE, estimate_facts, estimate_table, shape_of


def roofline(
    source: Annotated[
        Path,
        typer.Argument(metavar="PATH", parser=user_path, help="An artifact, or a MODEL_DIR with --agents, --rank."),
    ],
    schemes: Schemes = ALL_SCHEMES,
    gpu: Annotated[str, typer.Option(help="Name of the GPU, such as h100.")] = "h100",
    trajectories: Annotated[int, typer.Option(min=1, help="Trajectories in the step.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each trajectory.")] = 4096,
    decoding: Annotated[int, typer.Option(min=1, help="Agents of each trajectory in the step.")] = 1,
    agents: Annotated[int, typer.Option(min=1, help="Number of agents, for a MODEL_DIR.")] = 3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of their adapters, for a MODEL_DIR.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Estimate the time of a decode step on a GPU from its data sheet."""
    from lragent.reports.roofline import Load, estimate, gpu_named

    chosen, load, device = parse_schemes(schemes), Load(trajectories, decoding, context), gpu_named(gpu)
    shape = shape_of(source, agents, rank)
    estimates = [estimate(shape, device, load, sharing) for sharing in chosen]
    facts = estimate_facts(gpu, device, shape, load)
    if as_json:
        print_json({"note": NOTE, **facts, "estimates": [row.to_dict() for row in estimates]})
    else:
        results.print(estimate_table(estimates, facts))
