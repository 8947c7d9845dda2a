"""`lragent bench`: times a synthetic workload of several agents on an artifact, under chosen sharing schemes."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lragent.errors import RequestError
from lragent.program.defaults import ATTENTION, BACKEND, DEVICE, KV_MEMORY, MAX_BATCH_TOKENS

from .engine_options import (
    ALL_SCHEMES,
    AllowCompiled,
    ArtifactArgument,
    AsJson,
    Attention,
    Backend,
    Concurrency,
    Device,
    EngineOptions,
    KvMemory,
    MaxBatchTokens,
    Schemes,
    Threads,
    parse_schemes,
)
from .output import print_json, results
from .scheme_runs import SchemeRun, comparison_table, run_scheme

if TYPE_CHECKING:
    from lragent.runtime import RolloutResult, Workflow


@dataclass(frozen=True)
class Workload:
    """Trajectories in which agents take turns over random tokens. The tokens are the same under every scheme."""

    trajectories: int
    turns: int
    prompt_tokens: int
    new_tokens: int
    observation_tokens: int
    seed: int = 0

    def tasks(self) -> list[dict[str, Any]]:
        return [{"id": index} for index in range(self.trajectories)]

    def workflow(self, agents: tuple[str, ...], vocab_size: int) -> Workflow:
        async def take_turns(task: dict[str, Any], t: Any) -> dict[str, Any]:
            rng = random.Random(f"{self.seed}-{task['id']}")

            def some(count: int) -> list[int]:
                return [rng.randrange(vocab_size) for _ in range(count)]

            t.append(some(self.prompt_tokens))
            for turn in range(self.turns):
                await t.agenerate(agents[turn % len(agents)], forced=some(self.new_tokens))
                if self.observation_tokens:
                    t.append(some(self.observation_tokens))
            return {}

        return take_turns


def bench(
    artifact: ArtifactArgument,
    schemes: Schemes = ALL_SCHEMES,
    trajectories: Annotated[int, typer.Option(min=1)] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each trajectory; agents alternate.")] = 6,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated in each turn.")] = 16,
    observation_tokens: Annotated[int, typer.Option(min=0, help="Tokens appended after each turn.")] = 64,
    concurrency: Concurrency = 8,
    kv_memory: KvMemory = KV_MEMORY,
    max_batch_tokens: MaxBatchTokens = MAX_BATCH_TOKENS,
    backend: Backend = BACKEND,
    attention: Attention = ATTENTION,
    device: Device = DEVICE,
    threads: Threads = None,
    allow_compiled: AllowCompiled = True,
    as_json: AsJson = False,
) -> None:
    """Time a synthetic workload of forced random tokens, which are the same under every scheme.

    The exit code is 1 if a trajectory failed.
    """
    workload = Workload(trajectories, turns, prompt_tokens, new_tokens, observation_tokens)
    options = EngineOptions(kv_memory, max_batch_tokens, backend, attention, device, threads, allow_compiled)
    runs: list[SchemeRun] = []
    failed: list[str] = []

    def keep(outcome: RolloutResult) -> None:
        if outcome.error is not None:
            failed.append(f"{outcome.error.type}: {outcome.error.message}")

    facts: dict[str, str] = {}
    for sharing in parse_schemes(schemes):
        engine = options.load(artifact, sharing)
        facts = dict(engine.program.facts)
        warm_up(engine, workload)
        acting = tuple(name for name in engine.agents if name != "base") or engine.agents
        workflow = workload.workflow(acting, engine.program.vocab_size)
        runs.append(run_scheme(engine, workflow, workload.tasks(), concurrency, keep))
        del engine
    if as_json:
        print_json({**facts, "workload": dataclasses.asdict(workload), "runs": [run.to_dict() for run in runs]})
    else:
        results.print(comparison_table(runs, f"{artifact} ({', '.join(facts.values())})"))
    if failed:
        raise RequestError(
            f"{len(failed)} of {len(runs) * trajectories} trajectories failed, so the figures can't be compared; the "
            f"first error is {failed[0]}",
            "Choose fewer tokens or turns, or more cache (--kv-memory).",
        )


def warm_up(engine: Any, workload: Workload) -> None:
    """Runs one short turn, so that the first measured turn includes no one-time setup."""
    with engine.trajectory([0] * min(16, workload.prompt_tokens)) as t:
        t.generate(engine.agents[-1], max_new_tokens=2, ignore_eos=True)
