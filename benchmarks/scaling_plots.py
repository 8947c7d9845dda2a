"""Draws the figures of `benchmarks.scaling`: scaling-decode.svg and scaling-agents.svg.

    python -m benchmarks.scaling_plots OUT_DIR/figures.json docs

Needs matplotlib (`pip install -e ".[bench]"`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLOURS = {"non_shared": "tab:red", "base_lr_shared": "tab:blue", "full_shared": "tab:grey"}


def draw_decode(points: list[dict[str, Any]], to: Path) -> None:
    """Tokens per second over concurrent sequences, one line per context."""
    contexts = sorted({p["context"] for p in points})
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for shade, context in zip((1.0, 0.65, 0.4), contexts, strict=False):
        mine = [p for p in points if p["context"] == context]
        at = [p["sequences"] for p in mine]
        for name, scheme, style in (("split", "base_lr_shared", "-"), ("dense", "full_shared", ":")):
            rate = [p["sequences"] / p[name] for p in mine]
            label = f"{name}, context {context}"
            axes.plot(at, rate, style, marker="o", color=COLOURS[scheme], alpha=shade, label=label)
    axes.set(xscale="log", yscale="log", xlabel="sequences decoded together", ylabel="tokens a second")
    axes.set_xticks(sorted({p["sequences"] for p in points}), labels=map(str, sorted({p["sequences"] for p in points})))
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(to, bbox_inches="tight", metadata={"Date": None})


def draw_agents(points: list[dict[str, Any]], to: Path) -> None:
    """Seconds and cache bytes over agents that read one trajectory; one column of plots per context."""
    contexts = sorted({p["context"] for p in points})
    figure, grid = pyplot.subplots(2, len(contexts), figsize=(3.4 * len(contexts), 6), sharex=True, squeeze=False)
    for column, context in enumerate(contexts):
        for scheme, colour in COLOURS.items():
            mine = [p for p in points if p["context"] == context and p["scheme"] == scheme]
            at = [p["agents"] for p in mine]
            grid[0][column].plot(at, [p["seconds"] for p in mine], marker="o", color=colour, label=scheme)
            grid[1][column].plot(at, [p["cache_bytes"] / 2**20 for p in mine], marker="o", color=colour)
        grid[0][column].set(title=f"context {context}", yscale="log")
        grid[1][column].set(xlabel="agents", yscale="log", xscale="log")
        ticks = sorted({p["agents"] for p in points})
        grid[1][column].set_xticks(ticks, labels=map(str, ticks))
        grid[1][column].minorticks_off()
    grid[0][0].set_ylabel("seconds")
    grid[1][0].set_ylabel("cache, MiB")
    grid[0][0].legend(fontsize=7)
    figure.savefig(to, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same figures give the same file
    figures = json.loads(options.figures.read_text())
    draw_decode(figures["decode"], options.out / "scaling-decode.svg")
    draw_agents(figures["agents"], options.out / "scaling-agents.svg")


if __name__ == "__main__":
    main()
