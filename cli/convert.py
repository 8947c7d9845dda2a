"""`lragent convert`: writes an artifact from a model directory and adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import lragent
from lragent.files.user_path import user_path
from lragent.program.defaults import ATTENTION

from .adapter_arguments import parse_adapters
from .engine_options import Adapters, AsJson, Attention, ModelArgument
from .misses import miss_lines
from .output import print_json, results, stages
from .quantities import show_seconds

if TYPE_CHECKING:
    from lragent.artifact.build import ConvertReport

LAYOUTS: dict[str, tuple[Literal["split", "dense"], ...] | None] = {
    "auto": None,
    "split": ("split",),
    "dense": ("dense",),
    "both": ("split", "dense"),
    "none": (),
}


def convert(
    model_dir: ModelArgument,
    adapters: Adapters,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="NAME.lragent", parser=user_path, help="Artifact to write.")
    ],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: that of the checkpoint (float32 for GGUF).")
    ] = "auto",
    layouts: Annotated[
        Literal["auto", "split", "dense", "both", "none"],
        typer.Option(
            help="Layouts to compile now. Others are compiled when they are first loaded. auto: the one that rollout "
            "needs by default: dense, or that of the scheme that the adapters were tuned for."
        ),
    ] = "auto",
    attention: Attention = ATTENTION,
    unit: Annotated[
        Literal["model", "layer"],
        typer.Option(help="Compile the whole model, or each kind of layer once (faster for deep models)."),
    ] = "model",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing artifact.")] = False,
    spare: Annotated[int, typer.Option(min=0, help="Slots kept free for agents that --update adds later.")] = 0,
    update: Annotated[
        bool, typer.Option("--update", help="Put these adapters into the artifact and keep its compiled programs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an artifact from a model directory and LoRA adapters."""
    named = parse_adapters(adapters)
    if update and (overwrite or spare):
        raise typer.BadParameter("--update keeps the artifact's slots: it excludes --overwrite and --spare")
    if update and unit != "model":
        raise typer.BadParameter("--update keeps the compiled programs: it excludes --unit")
    with stages("updating" if update else "converting") as show:
        if update:
            report = lragent.update(out, model_dir, named, show)
        else:
            report = lragent.convert(
                model_dir,
                named,
                out,
                dtype=dtype,
                layouts=LAYOUTS[layouts],
                attention=attention,
                overwrite=overwrite,
                compiled=layouts != "none",
                progress=show,
                spare=spare,
                unit=unit,
            )
    if as_json:
        print_json({**dataclasses.asdict(report), "out": str(report.out)})
        return
    print_report(report, results)


def print_report(report: ConvertReport, console: Console) -> None:
    """Prints path, agents, seconds of each stage, places that did not match, reasons of refusals, and notes."""
    console.print(f"wrote {report.out} for {', '.join(report.agents)}", markup=False, soft_wrap=True)
    width = max([24, *map(len, report.seconds)])
    for stage, seconds in report.seconds.items():
        console.print(f"  {stage:<{width}} {show_seconds(seconds):>10}", markup=False, soft_wrap=True)
    for line in miss_lines(report.misses):
        console.print(line, markup=False, soft_wrap=True)
    if report.refusal:
        refusal = f"split layout refused, so only non_shared and full_shared work: {report.refusal}"
        console.print(refusal, markup=False, soft_wrap=True)
    if report.unit_refusal:
        refusal = f"compiled whole, not by layer: {report.unit_refusal}"
        console.print(refusal, markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for note in report.tokenizer:
        console.print(f"tokenizer: {note}", markup=False, soft_wrap=True)
    if report.advice:
        console.print(f"note: {report.advice}", markup=False, soft_wrap=True)
