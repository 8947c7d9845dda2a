"""Compares an artifact with plain PEFT: greedy turns of every agent, under several sharing schemes.

The turns start fresh trajectories. A first turn is exact under every sharing scheme but `neutral_shared`, under which
only `base` equals PEFT: there, no other agent is compared.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.artifact.directory import open_artifact
from lragent.artifact.manifest import Manifest
from lragent.errors import AdapterError, RequestError
from lragent.loading.hub import locate_adapter, locate_model
from lragent.loading.stages import Progress
from lragent.program.agent import BASE
from lragent.reports.peft_reference import PeftReference
from lragent.runtime import Engine
from lragent.runtime.schemes import scheme_named

PROMPTS = (
    "The capital of France is",
    "Question: A train leaves at nine and arrives at noon. How long does it travel?\nAnswer:",
    "def fibonacci(n):\n",
)
ID_PROMPTS = (5, 24, 12)  # lengths of prompts of token ids
SCHEMES = ("non_shared", "base_lr_shared")
FLOAT32_TOLERANCE = 1e-3

Prompt = str | Sequence[int]


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
    """All comparisons.

    Args:
        tolerance: the largest difference that counts as equal.
        on_text: False if the prompts were token ids.
    """

    comparisons: tuple[Comparison, ...]
    tolerance: float
    on_text: bool = True

    @property
    def worst(self) -> float:
        """Largest difference of a log-probability, or lead of another token."""
        return max(max(row.difference, row.behind) for row in self.comparisons)

    @property
    def equal(self) -> bool:
        return self.worst <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.comparisons]
        return {"equal": self.equal, "tolerance": self.tolerance, "on_text": self.on_text, "comparisons": rows}


def verify(
    path: Path,
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    engine_for: Callable[[str], Engine],
    prompts: Sequence[Prompt] | None = None,
    schemes: Sequence[str] = SCHEMES,
    new_tokens: int = 32,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks the hashes of weight and tokenizer files, then compares the artifact with PEFT in float32.

    Args:
        path: the artifact; `model_dir`, `adapters`: the files from which it was converted, or their hub ids. An id
            without a revision is the commit from which the artifact was converted.
        engine_for: opens the artifact with a sharing scheme.
        prompts: None: `PROMPTS` or, if the artifact has no tokenizer, random token ids.
        new_tokens: tokens generated for each prompt.
        tolerance: see `Verification`. None: 0.001, or for an artifact of 16 bits twice the largest `Comparison.own`
            if that is more.
        progress: called with the name of each stage when it begins.

    Raises:
        AdapterError: `adapters` are not the artifact's agents.
        ArtifactError: a file is damaged.
        ModelError, AdapterError: the model or an adapter can't be found or read.
        RequestError: there is no prompt or no scheme, or a prompt is text and the artifact has no tokenizer.
    """
    show: Progress = progress or (lambda stage: None)
    opened = open_artifact(path)
    manifest = opened.manifest
    if prompts is None:
        prompts = PROMPTS if manifest.tokenizer else random_prompts(manifest, new_tokens)
    if not prompts or not schemes:
        raise RequestError("verify has no prompt or no sharing scheme", "Pass at least one of each.")
    if not manifest.tokenizer and any(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(
            f"{path} has no tokenizer, and a prompt is text", "Leave the prompts out: verify then runs on token ids."
        )
    differing = {agent.name for agent in manifest.agents if agent.digest} ^ set(adapters)
    if differing:
        raise AdapterError(f"{path} and the adapters differ in {', '.join(sorted(differing))}", "Name all its agents.")
    pins = manifest.sources
    model = locate_model(model_dir, pins.get(BASE, "")).path
    folders = {name: locate_adapter(name, folder, pins.get(name, "")).path for name, folder in adapters.items()}
    show("hashing weights")
    opened.weights(hashed=True)
    for entry in opened.manifest.tokenizer:
        opened.file(entry)
    show("loading the model with PEFT")
    reference = PeftReference(model, folders, "float32")
    rounded = None if manifest.dtype == "float32" else PeftReference(model, folders, manifest.dtype)
    comparisons: list[Comparison] = []
    for sharing in schemes:
        show(f"comparing {sharing}")
        comparisons += compare(engine_for(sharing), reference, rounded, prompts, new_tokens)
    if tolerance is None:
        tolerance = max(FLOAT32_TOLERANCE, *(2 * row.own for row in comparisons))
    return Verification(tuple(comparisons), tolerance, on_text=isinstance(prompts[0], str))


def random_prompts(manifest: Manifest, new_tokens: int) -> tuple[list[int], ...]:
    """Prompts of random token ids, the same every time, which leave room for `new_tokens`."""
    rng = random.Random(0)
    room = max(1, manifest.max_positions - new_tokens)
    return tuple([rng.randrange(manifest.vocab_size) for _ in range(min(length, room))] for length in ID_PROMPTS)


def compare(
    engine: Engine, reference: PeftReference, rounded: PeftReference | None, prompts: Sequence[Prompt], new_tokens: int
) -> Iterator[Comparison]:
    """Generates greedily with every agent that equals PEFT on fresh trajectories, and lets PEFT score the same tokens.

    Args:
        reference: PEFT in float32.
        rounded: PEFT in the artifact's dtype; None if that is float32.
    """
    for agent in (BASE,) if scheme_named(engine.sharing).written_as_base else engine.agents:
        behind: list[float] = []
        differences: list[float] = []
        own = [0.0]
        for start in prompts:
            with engine.trajectory(start) as t:
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
