"""The six sharing schemes by their definitions, for one trajectory: slow, plain PyTorch, nothing from lragent.

Every pass runs the Hugging Face model over the whole sequence; `kv_projection` puts remembered K/V in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracle.kv_projection import KvProjection, Memory, Pass, kv_outputs
from tests.oracle.peft_oracle import BASE, load_peft
from tests.oracle.precision import computing_in

SCHEMES = ("non_shared", "full_shared", "base_shared", "base_lr_shared", "rebase_shared", "neutral_shared")

Step = tuple[Any, ...]


@dataclass(frozen=True)
class TurnResult:
    """One turn: tokens, their log-probabilities, the likeliest tokens and their lead.

    Log-probabilities are computed in the dtype of the model, at least in float32. `gaps`: log-probability of the
    likeliest token less that of the second.
    """

    token_ids: list[int]
    logprobs: list[float]
    likeliest: list[int]
    gaps: list[float]


@dataclass
class SharingOracle:
    """A trajectory under one scheme.

    Args:
        written: tokens that have K/V (per agent under non_shared).
        caught_up: per agent, tokens that have its columns (base_shared).
        open_turn: tokens and acting agent that still want their adapter-free pass (rebase_shared).
    """

    model: Any
    projections: list[KvProjection]
    agents: tuple[str, ...]
    scheme: str
    dtype: torch.dtype
    ids: list[int] = field(default_factory=list)
    written: dict[str | None, int] = field(default_factory=dict)
    caught_up: dict[str, int] = field(default_factory=dict)
    open_turn: tuple[int, int, str] | None = None
    memories: dict[str | None, list[Memory]] = field(default_factory=dict)

    def fork(self) -> SharingOracle:
        """A copy that shares the model."""
        keep = {id(self.model): self.model, id(self.projections): self.projections}
        return copy.deepcopy(self, keep)

    def truncate(self, length: int) -> None:
        del self.ids[length:]
        self.written = {owner: min(n, length) for owner, n in self.written.items()}
        self.caught_up = {agent: min(n, length) for agent, n in self.caught_up.items()}
        if self.open_turn is not None:
            start, end, agent = self.open_turn
            self.open_turn = (start, min(end, length), agent) if start < length else None

    def turn(self, agent: str, tokens: int, forced: Sequence[int] | None = None) -> TurnResult:
        """The agent reads what is there and adds tokens, greedily or as forced."""
        self._settle()
        owner = agent if self.scheme == "non_shared" else None
        turn_start = self.written.get(owner, 0)
        self._catch_up(agent)
        result = TurnResult([], [], [], [])
        for i in range(tokens):
            logits = self._act(agent, owner)
            logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            first, second = logprobs.topk(2).values.tolist()
            result.likeliest.append(int(logprobs.argmax()))
            result.gaps.append(first - second)
            token = int(forced[i]) if forced is not None else result.likeliest[-1]
            result.token_ids.append(token)
            result.logprobs.append(float(logprobs[token]))
            self.ids.append(token)
        if self.scheme == "rebase_shared" and agent != BASE and self.written.get(owner, 0) > turn_start:
            self.open_turn = (turn_start, self.written[owner], agent)
        return result

    def _act(self, agent: str, owner: str | None) -> Tensor:
        """Processes pending tokens as their writer; with none pending, runs the last one again and keeps nothing.

        Under neutral_shared the writer is `base`, and the acting agent then runs the last token again.
        """
        if self.scheme == "neutral_shared" and agent != BASE and self.written.get(owner, 0) < len(self.ids):
            self._act(BASE, owner)
        start, end = self.written.get(owner, 0), len(self.ids)
        full = self.scheme in ("non_shared", "full_shared")
        adapter = None if agent == BASE else agent
        if start == end:
            again = Pass(end - 1, end, adapter, full, old_base=True, old_columns=True)
            # Under dense schemes the last token reads its own remembered K/V: it counts as a row before the start.
            if full:
                again = Pass(end, end, adapter, full)
            return self._run(again, owner)
        logits = self._run(Pass(start, end, adapter, full), owner)
        own = (agent,) if self.scheme == "base_shared" else self.agents
        self._remember(base=True, agents=own)
        self.written[owner] = end
        if agent != BASE:
            self.caught_up[agent] = end
        return logits

    def _catch_up(self, agent: str) -> None:
        """base_shared: the agent's own columns over tokens that others wrote; base is read, not rewritten."""
        start, end = self.caught_up.get(agent, 0), self.written.get(None, 0)
        if self.scheme != "base_shared" or agent == BASE or start >= end:
            return
        self._run(Pass(start, end, agent, old_base=True), None)
        self._remember(base=False, agents=(agent,))
        self.caught_up[agent] = end

    def _settle(self) -> None:
        """rebase_shared: the adapter-free pass over the tokens of the last turn."""
        if self.open_turn is None:
            return
        start, end, acting = self.open_turn
        self.open_turn = None
        self._run(Pass(start, end, None), None)
        self._remember(base=True, agents=tuple(a for a in self.agents if a != acting))

    def _run(self, now: Pass, owner: str | None) -> Tensor:
        """Logits of the last token of a pass."""
        memories = self.memories.setdefault(owner, [p.empty_memory(self.dtype) for p in self.projections])
        for projection, memory in zip(self.projections, memories, strict=True):
            projection.start(now, memory)
        ids = torch.tensor([self.ids[: now.end]])
        with torch.no_grad(), computing_in(self.dtype):
            if now.agent is None:
                with self.model.disable_adapter():
                    return self.model(input_ids=ids, use_cache=False).logits[0, -1]
            self.model.set_adapter(now.agent)
            return self.model(input_ids=ids, use_cache=False).logits[0, -1]

    def _remember(self, base: bool, agents: tuple[str, ...]) -> None:
        for projection in self.projections:
            projection.remember(base, agents)

    def base_streams(self) -> list[Tensor]:
        """Base K/V held of every projection that feeds K or V, `[written tokens, K/V outputs]`; shared schemes only."""
        self._settle()
        held = zip(self.projections, self.memories[None], strict=True)
        return [memory.base[: self.written[None], projection.kv] for projection, memory in held]

    def play(self, script: Sequence[Step]) -> tuple[SharingOracle, list[TurnResult]]:
        """The trajectory at the end (the last fork, if any) and all turns."""
        oracle, results = self, []
        for step in script:
            if step[0] == "append":
                oracle.ids.extend(step[1])
            elif step[0] == "turn":
                results.append(oracle.turn(*step[1:]))
            elif step[0] == "truncate":
                oracle.truncate(step[1])
            elif step[0] == "fork":
                oracle = oracle.fork()
            else:
                raise ValueError(f"unknown step {step[0]!r}")
        return oracle, results


def new_oracle(model_dir: Path, adapters: Mapping[str, Path], scheme: str, dtype: torch.dtype) -> SharingOracle:
    """An oracle whose model is that of the last oracles of the same files and dtype; files are taken to stay."""
    model, projections = _taken_apart(model_dir, tuple(adapters.items()), dtype)
    return SharingOracle(model, projections, tuple(adapters), scheme, dtype)


@lru_cache(maxsize=2)  # a script is run in two dtypes
def _taken_apart(
    model_dir: Path, adapters: tuple[tuple[str, Path], ...], dtype: torch.dtype
) -> tuple[Any, list[KvProjection]]:
    """Loads the model and takes its K/V projections apart. They keep nothing from pass to pass."""
    model = load_peft(model_dir, dict(adapters), dtype)
    projections = []
    for name, module in list(model.get_base_model().named_modules()):
        leaf = name.rpartition(".")[2]
        outputs = kv_outputs(leaf, model.config)
        if outputs is not None:
            parent = model.get_base_model().get_submodule(name.rpartition(".")[0])
            projection = KvProjection(module, outputs)
            setattr(parent, leaf, projection)
            projections.append(projection)
    # A name that kv_outputs doesn't know would leave its layer unshared: every scheme would be PEFT there.
    streams = sum(1 if projection.kv.all() else 2 for projection in projections)
    assert streams == 2 * model.config.num_hidden_layers, f"{streams} of the model's K and V streams found"
    return model, projections


def run_script(
    model_dir: Path,
    adapters: Mapping[str, Path],
    scheme: str,
    script: Sequence[Step],
    dtype: torch.dtype = torch.float64,
) -> list[TurnResult]:
    """Runs steps ("append", ids) | ("turn", agent, n, forced or None) | ("truncate", n) | ("fork",) and returns turns.

    After "fork" the steps go on on the fork.
    """
    return new_oracle(model_dir, adapters, scheme, dtype).play(script)[1]


def final_base_streams(
    model_dir: Path,
    adapters: Mapping[str, Path],
    scheme: str,
    script: Sequence[Step],
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Base K/V held after a script, see `SharingOracle.base_streams`; a due adapter-free pass is run first."""
    return new_oracle(model_dir, adapters, scheme, dtype).play(script)[0].base_streams()


def assert_schemes_differ(results: Mapping[str, Sequence[TurnResult]], least: float = 1e-3) -> None:
    """On a good input every two schemes give clearly different log-probabilities."""
    names = list(results)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            largest = max(
                abs(x - y)
                for a, b in zip(results[left], results[right], strict=True)
                for x, y in zip(a.logprobs, b.logprobs, strict=True)
            )
            assert largest > least, f"{left} and {right} differ by {largest} only"
