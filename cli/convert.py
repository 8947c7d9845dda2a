"""`lragent convert`: model directory and adapters in, artifact out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import lragent

from .adapter_arguments import parse_adapters
from .engine_options import Adapters, AsJson, Attention, ModelArgument
from .output import print_json, results, stages
from .quantities import show_seconds

if TYPE_CHECKING:
    from lragent.build_artifact import ConvertReport

LAYOUTS: dict[str, tuple[Literal["split", "dense"], ...]] = {
    "split": ("split",),
    "dense": ("dense",),
    "both": ("split", "dense"),
    "none": (),
}


def convert(
    model_dir: ModelArgument,
    adapters: Adapters,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NAME.lragent", help="Artifact to write.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    layouts: Annotated[
        Literal["split", "dense", "both", "none"],
        typer.Option(help="What to compile now; the rest is compiled when it is first loaded."),
    ] = "split",
    attention: Attention = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an artifact from a model directory and LoRA adapters."""
    with stages("converting") as show:
        report = lragent.convert(
            model_dir,
            parse_adapters(adapters),
            out,
            dtype=dtype,
            layouts=LAYOUTS[layouts],
            attention=attention,
            overwrite=overwrite,
            compiled=layouts != "none",
            progress=show,
        )
    if as_json:
        print_json({**dataclasses.asdict(report), "out": str(report.out)})
        return
    print_report(report, results)


def print_report(report: ConvertReport, console: Console) -> None:
    """Where the artifact is, for whom, how long each stage took, and what split layout was refused for."""
    console.print(f"wrote {report.out} for {', '.join(report.agents)}", markup=False, soft_wrap=True)
    for stage, seconds in report.seconds.items():
        console.print(f"  {stage:<24} {show_seconds(seconds):>10}", markup=False, soft_wrap=True)
    if report.refusal:
        refusal = f"split layout refused, so only non_shared and full_shared work: {report.refusal}"
        console.print(refusal, markup=False, soft_wrap=True)
