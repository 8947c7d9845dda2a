"""`lragent verify`: an artifact against plain PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lragent.errors import AdapterError, TaskFileError

from .adapter_arguments import parse_adapters
from .engine_options import (
    Adapters,
    AllowCompiled,
    ArtifactArgument,
    AsJson,
    Attention,
    Backend,
    EngineOptions,
    Schemes,
    Threads,
    parse_schemes,
)
from .output import print_json, results, stages

if TYPE_CHECKING:
    from lragent.runtime import Engine

    from .peft_reference import PeftReference

PROMPTS = (
    "The capital of France is",
    "Question: A train leaves at nine and arrives at noon. How long does it travel?\nAnswer:",
    "def fibonacci(n):\n",
)
VERIFY_MEMORY = "512MiB"
FLOAT32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One agent's greedy turns on all prompts, under one sharing scheme.

    Args:
        same: tokens that PEFT's greedy decoding would choose as well, of `tokens`.
        behind: the most by which PEFT finds another token likelier.
        difference: the largest difference of a token's log-probability.
        own: the same of PEFT itself in the artifact's dtype, if that is of 16 bits; else 0.
    """

    sharing: str
    agent: str
    tokens: int
    same: int
    behind: float
    difference: float
    own: float


def verify(
    artifact: ArtifactArgument,
    model: Annotated[Path, typer.Option(metavar="MODEL_DIR", help="The model that it was converted from.")],
    adapters: Adapters,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="One prompt a line.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each prompt.")] = 32,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of log-probabilities to accept; else 0.001 or, for an artifact of 16 bits, twice "
            "what PEFT itself is off in that dtype.",
            show_default=False,
        ),
    ] = None,
    schemes: Schemes = "non_shared,base_lr_shared",
    backend: Backend = "auto",
    attention: Attention = "auto",
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    as_json: AsJson = False,
) -> None:
    """Compare an artifact with PEFT in float32: first turns of every agent, which are exact under every sharing scheme.

    Files are hashed first. The exit code is 1 if a difference is above the tolerance.
    """
    from lragent.artifact.directory import open_artifact

    from .peft_reference import PeftReference

    named, texts = parse_adapters(adapters), read_prompts(prompts)
    opened = open_artifact(artifact)
    missing = {agent.name for agent in opened.manifest.agents if agent.digest} ^ set(named)
    if missing:
        raise AdapterError(f"{artifact} and --adapters differ in {', '.join(sorted(missing))}", "Name all its agents.")
    with stages("verifying") as show:
        show("hashing weights")
        opened.weights(hashed=True)
        show("loading the model with PEFT")
        reference = PeftReference(model, named, "float32")
        dtype = opened.manifest.dtype
        rounded = None if dtype == "float32" else PeftReference(model, named, dtype)
        comparisons: list[Comparison] = []
        for sharing in parse_schemes(schemes):
            show(f"comparing {sharing}")
            options = EngineOptions(
                VERIFY_MEMORY, backend=backend, attention=attention, threads=threads, allow_compiled=allow_compiled
            )
            comparisons += compare(options.load(artifact, sharing), reference, rounded, texts, new_tokens)
    worst = max(max(row.difference, row.behind) for row in comparisons)
    if tolerance is None:
        tolerance = max(FLOAT32_TOLERANCE, *(2 * row.own for row in comparisons))
    if as_json:
        rows = [dataclasses.asdict(row) for row in comparisons]
        print_json({"equal": worst <= tolerance, "tolerance": tolerance, "comparisons": rows})
    else:
        results.print(comparison_table(comparisons, f"{artifact} against PEFT"))
        results.print(f"largest difference {worst:.2e}, tolerance {tolerance:.2e}: {_verdict(worst <= tolerance)}")
    if worst > tolerance:
        raise typer.Exit(1)


def compare(
    engine: Engine, reference: PeftReference, rounded: PeftReference | None, texts: list[str], new_tokens: int
) -> Iterator[Comparison]:
    """Greedy turns on fresh trajectories, scored by PEFT on the same tokens, and by PEFT in the artifact's dtype."""
    for agent in engine.agents:
        behind: list[float] = []
        differences: list[float] = []
        own = [0.0]
        for text in texts:
            with engine.trajectory(text) as t:
                prompt = t.token_ids
                turn = t.generate(agent, max_new_tokens=new_tokens, ignore_eos=True)
            scored = reference.score(agent, prompt, turn.token_ids)
            behind += scored.behind
            differences += distances(turn.logprobs, scored.logprobs)
            if rounded is not None:
                own += distances(rounded.score(agent, prompt, turn.token_ids).logprobs, scored.logprobs)
        same = sum(gap == 0 for gap in behind)
        yield Comparison(engine.sharing, agent, len(behind), same, max(behind), max(differences), max(own))


def distances(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(left, right, strict=True)]


def read_prompts(file: Path | None) -> list[str]:
    """Prompts of a file, one a line, or a few of our own.

    Raises:
        TaskFileError: the file can't be read, or has no prompt.
    """
    if file is None:
        return list(PROMPTS)
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskFileError(f"{file} can't be read: {error}", "Give a UTF-8 file with one prompt a line.") from error
    if not prompts:
        raise TaskFileError(f"{file} has no prompt", "Write one prompt a line.")
    return prompts


def comparison_table(comparisons: list[Comparison], title: str) -> Table:
    """A row for each scheme and agent."""
    table = Table(title=title, title_justify="left")
    table.add_column("sharing")
    table.add_column("agent")
    rounds = any(row.own for row in comparisons)
    own_column = ("PEFT's own, in that dtype",) if rounds else ()
    for column in ("tokens as PEFT", "PEFT prefers another by", "log-probability differs by", *own_column):
        table.add_column(column, justify="right")
    for row in comparisons:
        figures = [f"{row.same} of {row.tokens}", f"{row.behind:.1e}", f"{row.difference:.1e}"]
        table.add_row(row.sharing, row.agent, *figures, *([f"{row.own:.1e}"] if rounds else []))
    return table


def _verdict(equal: bool) -> str:
    return "equal" if equal else "NOT EQUAL"
