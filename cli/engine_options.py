"""Options that several commands share, and the engine that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

import lragent
from lragent.files.user_path import user_path
from lragent.program.defaults import ATTENTION, BACKEND, DEVICE, KV_MEMORY, MAX_BATCH_TOKENS, MAX_KL

if TYPE_CHECKING:
    from lragent.runtime import Engine

Scheme = Literal["non_shared", "full_shared", "base_shared", "base_lr_shared", "rebase_shared", "neutral_shared"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
ALL_SCHEMES = ",".join(SCHEMES)

ArtifactArgument = Annotated[
    Path, typer.Argument(metavar="NAME.lragent", parser=user_path, help="Artifact that `lragent convert` wrote.")
]
Sharing = Annotated[
    Literal["auto", Scheme],
    typer.Option(
        help="Sharing scheme; only non_shared equals PEFT. auto: the scheme that the adapters were tuned for, else the "
        "cheapest one whose measured drift is small, else non_shared.",
    ),
]
MaxKl = Annotated[
    float,
    typer.Option(
        help="Drift that counts as no loss, in nats a token of the agent that drifts most: 0.2 has cost everything, "
        "0.005 nothing."
    ),
]
Schemes = Annotated[str, typer.Option("--schemes", metavar="A,B,...", help="Sharing schemes to compare.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Tasks that are under way at a time.")]
KvMemory = Annotated[str, typer.Option(metavar="SIZE", help="Memory for the cache, such as 2GiB.")]
MaxBatchTokens = Annotated[int, typer.Option(min=1, help="Most tokens a step.")]
Backend = Annotated[
    Literal["auto", "compiled", "eager"],
    typer.Option(
        help="auto: compiled on a CPU, eager on a GPU. compiled, so auto on a CPU, needs a C++ compiler where packages "
        "are missing; eager runs op by op, on a GPU as CUDA graphs where Triton is installed."
    ),
]
AttentionName = Literal["auto", "reference", "torch", "inductor", "cpp", "triton"]
Attention = Annotated[
    AttentionName,
    typer.Option(
        metavar="NAME",
        help=f"Attention implementation: {', '.join(get_args(AttentionName))}; auto picks one for the device.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")]
AllowCompiled = Annotated[
    bool,
    typer.Option("--allow-compiled/--no-compiled", help="Run the artifact's compiled code, or lower its graph again."),
]
Agents = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Agents that act: the cache has room for no others. All if not given."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory or hub id (OWNER/NAME@REVISION) of a Hugging Face causal LM.")
]
Adapters = Annotated[
    str,
    typer.Option(
        "--adapters",
        metavar="NAME=DIR,...",
        help="LoRA adapters, directories or hub ids; DIR,DIR takes the folders' names.",
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """Options of `lragent.load` other than the sharing scheme."""

    kv_memory: str = KV_MEMORY
    max_batch_tokens: int = MAX_BATCH_TOKENS
    backend: str = BACKEND
    attention: str = ATTENTION
    device: str = DEVICE
    threads: int | None = None
    allow_compiled: bool = True
    agents: tuple[str, ...] | None = None
    max_kl: float = MAX_KL

    def load(self, artifact: Path, sharing: str) -> Engine:
        return lragent.load(
            artifact,
            sharing=sharing,
            kv_memory=self.kv_memory,
            max_batch_tokens=self.max_batch_tokens,
            backend=self.backend,
            attention=self.attention,
            device=self.device,
            threads=self.threads,
            allow_compiled=self.allow_compiled,
            agents=self.agents,
            max_kl=self.max_kl,
        )


def parse_schemes(text: str) -> tuple[str, ...]:
    """Names of a comma-separated list, each known and given once.

    Raises:
        typer.BadParameter: an unknown name, or one given twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SCHEMES:
            raise typer.BadParameter(f"unknown sharing scheme {name!r}; there are {', '.join(SCHEMES)}")
        if names.count(name) > 1:
            raise typer.BadParameter(f"sharing scheme {name!r} is given twice")
    return tuple(names)
