"""`lragent inspect`: describes an artifact, or the artifact that a model and adapters would give."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import lragent
from lragent.errors import SplitRefused
from lragent.program.defaults import KV_MEMORY

from .adapter_arguments import parse_adapters
from .engine_options import AsJson
from .misses import miss_lines
from .output import print_json, results, stages
from .quantities import show_bytes, show_count

if TYPE_CHECKING:
    from lragent.reports.inspection import Inspection


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="An artifact or, with --adapters, a model directory or its hub id.")
    ],
    adapters: Annotated[
        str | None, typer.Option(metavar="NAME=DIR,...", help="Adapters of a model; nothing is compiled or written.")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Cache memory; shows how many tokens fit.")] = KV_MEMORY,
    as_json: AsJson = False,
) -> None:
    """Show agents, streams, key transforms, bytes a token under each scheme, and refusals."""
    from lragent.runtime.cache.memory import parse_bytes

    size = parse_bytes(memory, "--memory")
    if adapters is None:
        inspection = lragent.inspect(path)
    else:
        named = parse_adapters(adapters)
        try:
            with stages("capturing"):
                inspection = lragent.inspect(path, named)
        except SplitRefused as error:
            print_refused(error, as_json)
            raise
    fit = inspection.tokens_that_fit(size)
    if as_json:
        facts = {**inspection.to_dict(), "break_even": inspection.break_even}
        print_json({**facts, "memory": size, "tokens_that_fit": fit})
        return
    print_facts(inspection)
    results.print(layer_table(inspection))
    results.print(scheme_table(inspection, size))
    print_break_even(inspection)


def print_facts(inspection: Inspection) -> None:
    """Prints source, agents, compiled programs and refusals, one line each."""
    lines = [
        f"{inspection.source}: {inspection.architecture}, {inspection.dtype}, "
        f"{show_count(inspection.max_positions)} positions"
    ]
    lines += [
        f"agent {agent.name}: rank {agent.rank} on {len(agent.targets)} modules, weights sha256 {agent.digest[:12]}"
        + (f", tuned for {agent.tuned_for}" if agent.tuned_for else "")
        for agent in inspection.agents
    ]
    lines += [
        f"drift of {scheme}: {kl:.2g} nats a token of the agent that drifts most"
        for scheme, kl in inspection.drift.items()
    ]
    lines += [f"compiled for {target}: {', '.join(found)}" for target, found in inspection.compiled.items()]
    if inspection.spare:
        lines.append(f"{inspection.spare} spare slots for agents that an update adds")
    if inspection.refusal:
        lines.append(f"refused: {inspection.refusal}")
    lines += miss_lines(inspection.misses)
    lines += [f"{name} is {pin}" for name, pin in inspection.sources.items()]
    lines += [f"note: {note}" for note in inspection.notes]
    for line in lines:
        results.print(line, markup=False, soft_wrap=True)


def print_refused(error: SplitRefused, as_json: bool) -> None:
    """Prints every place for which a whole model is refused."""
    if as_json:
        print_json({"refusal": error.message, "refused": [dataclasses.asdict(miss) for miss in error.misses]})
        return
    for miss in error.misses:
        results.print(str(miss), markup=False, soft_wrap=True)


def print_break_even(inspection: Inspection) -> None:
    """Prints for each split scheme the number of agents at which it takes less cache than non_shared."""
    for scheme, least in inspection.break_even.items():
        when = f"once {least} agents have seen a token" if least is not None else "never, with these ranks"
        results.print(f"{scheme} takes less than non_shared: {when}", markup=False, soft_wrap=True)


def layer_table(inspection: Inspection) -> Table:
    """One row for each group of consecutive layers that are alike."""
    table = Table(title="streams per token", title_justify="left")
    for column in (
        "layers",
        "base K",
        "base V",
        "LR of K",
        "LR of V",
        "key transform",
    ):
        table.add_column(column, justify="left" if column in ("layers", "key transform") else "right")
    for group in inspection.layers:
        layers = str(group.first) if group.first == group.last else f"{group.first}-{group.last}"
        shared = " (same as K)" if group.shares_lr else ""
        table.add_row(
            layers,
            f"{group.kv_heads} x {group.k_dim}",
            f"{group.kv_heads} x {group.v_dim}",
            str(group.k_lr_width),
            f"{group.v_lr_width}{shared}",
            group.key_transform,
        )
    return table


def scheme_table(inspection: Inspection, memory: int) -> Table:
    """Bytes of a token, and tokens that fit, by number of agents that have seen the token."""
    table = Table(
        title=f"cache a token, by agents that have seen it, and tokens that fit into {show_bytes(memory)}",
        title_justify="left",
    )
    table.add_column("sharing")
    agents = range(1, max(map(len, inspection.bytes_per_token.values()), default=0) + 1)
    for count in agents:
        table.add_column(f"{count} agent{'s' if count > 1 else ''}", justify="right")
    fit = inspection.tokens_that_fit(memory)
    for scheme, sizes in inspection.bytes_per_token.items():
        cells = [
            f"{show_bytes(size)}, {show_count(tokens)} fit" for size, tokens in zip(sizes, fit[scheme], strict=True)
        ]
        table.add_row(scheme, *cells)
    return table
