"""Compares an artifact with plain PEFT: greedy turns of every agent, under several sharing schemes.

The turns start fresh trajectories, and a first turn is exact under every sharing scheme.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.artifact.directory import open_artifact
from lragent.errors import AdapterError, RequestError
from lragent.loading.stages import Progress
from lragent.reports.peft_reference import PeftReference
from lragent.runtime import Engine

PROMPTS = (
    "The capital of France is",
    "Question: A train leaves at nine and arrives at noon. How long does it travel?\nAnswer:",
    "def fibonacci(n):\n",
)
SCHEMES = ("non_shared", "base_lr_shared")
FLOAT32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One agent's greedy turns on all prompts, under one sharing scheme. Log-probabilities are natural logarithms.

    Args:
        tokens: generated tokens.
        same: number of them that PEFT's greedy decoding chooses too.
        behind: largest lead that PEFT's most likely token has over the generated one.
        difference: largest difference between the two log-probabilities of a generated token.
        own: the same difference between PEFT in the artifact's dtype and PEFT in float32; 0 for a float32 artifact.
    """

    sharing: str
    agent: str
    tokens: int
    same: int
    behind: float
    difference: float
    own: float


@dataclass(frozen=True)
class Verification:
    """All comparisons, and the largest difference that counts as equal."""

    comparisons: tuple[Comparison, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """Largest difference of a log-probability, or lead of another token."""
        return max(max(row.difference, row.behind) for row in self.comparisons)

    @property
    def equal(self) -> bool:
        return self.worst <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.comparisons]
        return {"equal": self.equal, "tolerance": self.tolerance, "comparisons": rows}


def verify(
    path: Path,
    model_dir: Path,
    adapters: Mapping[str, Path],
    engine_for: Callable[[str], Engine],
    prompts: Sequence[str] = PROMPTS,
    schemes: Sequence[str] = SCHEMES,
    new_tokens: int = 32,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks the hashes of all weight files, then compares the artifact with PEFT in float32.

    Args:
        path: the artifact; `model_dir`, `adapters`: the files from which it was converted.
        engine_for: opens the artifact with a sharing scheme.
        new_tokens: tokens generated for each prompt.
        tolerance: see `Verification`. None: 0.001, or for an artifact of 16 bits twice the largest `Comparison.own`
            if that is more.
        progress: called with the name of each stage when it begins.

    Raises:
        AdapterError: `adapters` are not the artifact's agents.
        ArtifactError: a weight file is damaged.
        RequestError: there is no prompt or no scheme.
    """
    if not prompts or not schemes:
        raise RequestError("verify has no prompt or no sharing scheme", "Pass at least one of each.")
    show: Progress = progress or (lambda stage: None)
    opened = open_artifact(path)
    differing = {agent.name for agent in opened.manifest.agents if agent.digest} ^ set(adapters)
    if differing:
        raise AdapterError(f"{path} and the adapters differ in {', '.join(sorted(differing))}", "Name all its agents.")
    show("hashing weights")
    opened.weights(hashed=True)
    show("loading the model with PEFT")
    reference = PeftReference(model_dir, adapters, "float32")
    dtype = opened.manifest.dtype
    rounded = None if dtype == "float32" else PeftReference(model_dir, adapters, dtype)
    comparisons: list[Comparison] = []
    for sharing in schemes:
        show(f"comparing {sharing}")
        comparisons += compare(engine_for(sharing), reference, rounded, prompts, new_tokens)
    if tolerance is None:
        tolerance = max(FLOAT32_TOLERANCE, *(2 * row.own for row in comparisons))
    return Verification(tuple(comparisons), tolerance)


def compare(
    engine: Engine, reference: PeftReference, rounded: PeftReference | None, prompts: Sequence[str], new_tokens: int
) -> Iterator[Comparison]:
    """Generates greedily with every agent on fresh trajectories and lets PEFT score the same tokens.

    Args:
        reference: PEFT in float32.
        rounded: PEFT in the artifact's dtype; None if that is float32.
    """
    for agent in engine.agents:
        behind: list[float] = []
        differences: list[float] = []
        own = [0.0]
        for text in prompts:
            with engine.trajectory(text) as t:
                prompt = t.token_ids
                turn = t.generate(agent, max_new_tokens=new_tokens, ignore_eos=True)
            scored = reference.score(agent, prompt, turn.token_ids)
            behind += scored.behind
            differences += _distances(turn.logprobs, scored.logprobs)
            if rounded is not None:
                own += _distances(rounded.score(agent, prompt, turn.token_ids).logprobs, scored.logprobs)
        same = sum(gap == 0 for gap in behind)
        yield Comparison(engine.sharing, agent, len(behind), same, max(behind), max(differences), max(own))


def _distances(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(left, right, strict=True)]
