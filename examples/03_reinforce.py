"""REINFORCE under a shared cache: the engine rolls out, `SharedModel` has the gradients.

    python -m examples.03_reinforce --model MODEL_DIR --work DIR

MODEL_DIR is SmolLM2-135M-Instruct. The agents of examples/fact_world start as shipped; under `base_lr_shared` most
verdicts of `reflect` are wrong. The reward of a task is 1 for a right answer and 1 for a right verdict: the answer is
that of `plan` and `action`, the verdict that of `reflect`. The advantage of an agent is its reward less the mean over
the samples of the same task.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import lragent
from examples.fact_world.format import ROLES
from examples.fact_world.workflow import workflow
from examples.fact_world.world import make_tasks
from lragent.loading.model import load_directories
from lragent.rollouts.turn_sequences import sequence_of

SHARING = "base_lr_shared"
ADAPTERS = {role: Path(__file__).parent / "fact_world" / "adapters" / role for role in ROLES}


class Sampling:
    """A trajectory whose agents sample at temperature 1."""

    def __init__(self, t: Any) -> None:
        self.append, self._t = t.append, t

    async def agenerate(self, agent: str, **options: Any) -> Any:
        return await self._t.agenerate(agent, **{**options, "temperature": 1.0})


async def sampled(task: Any, t: Any) -> dict[str, Any]:
    found = await workflow(task, Sampling(t))
    return {**found, "reward": float(found["exact_match"]) + float(found["verdict_correct"])}


def advantages(outcomes: list[Any], reward: str) -> list[float]:
    """The reward in each outcome's result less its mean over the samples of the task."""
    rewards: dict[Any, list[float]] = {}
    for outcome in outcomes:
        rewards.setdefault(outcome.task_id, []).append(float(outcome.result[reward]))
    return [outcome.result[reward] - statistics.mean(rewards[outcome.task_id]) for outcome in outcomes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".reinforce"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tasks", type=int, default=2, help="tasks a step")
    parser.add_argument("--samples", type=int, default=4, help="samples of a task")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    artifact = options.work / "agents.lragent"
    if not artifact.exists():
        lragent.convert(options.model, ADAPTERS, artifact, layouts=("split",))
    engine = lragent.load(artifact, sharing=SHARING)
    model = lragent.SharedModel.of_model(load_directories(options.model, ADAPTERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    pool = make_tasks("train", options.steps * options.tasks)
    means: list[float] = []
    for step in range(options.steps):
        tasks = [task for task in pool[step * options.tasks :][: options.tasks] for _ in range(options.samples)]
        outcomes = [outcome for outcome in engine.run(sampled, tasks, seed=step) if outcome.error is None]
        means.append(statistics.mean(outcome.result["reward"] for outcome in outcomes))
        records = [outcome.trajectories[0] for outcome in outcomes]
        sequences = [sequence for record in records if (sequence := sequence_of(record)) is not None]
        rows = lragent.rows_of(SHARING, sequences, model.agents)
        logprobs_R = model(rows).log_softmax(-1).gather(1, rows.targets_R[:, None])[:, 0]
        rolled_R = torch.tensor([p for record in records for p in record.logprobs if p is not None])
        apart = float((logprobs_R.detach() - rolled_R).abs().mean())
        counts = torch.tensor([sum(turn.end - turn.start for turn in sequence.turns) for sequence in sequences])
        answer_R, verdict_R = (
            torch.tensor(advantages(outcomes, reward)).repeat_interleave(counts)
            for reward in ("exact_match", "verdict_correct")
        )
        advantages_R = torch.where(rows.target_agents_R == 1 + model.agents.index("reflect"), verdict_R, answer_R)
        loss = -(advantages_R * logprobs_R).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        engine.update_adapters({agent: model.adapter_weights(agent) for agent in model.agents})
        print(json.dumps({"step": step, "reward": means[-1], "apart": apart, "tokens": len(rolled_R)}), flush=True)
    for name, part in (("first", means[:20]), ("last", means[-20:])):
        half = 1.96 * statistics.stdev(part) / len(part) ** 0.5 if len(part) > 1 else float("nan")
        print(f"mean reward of the {name} {len(part)} steps: {statistics.mean(part):.2f} +- {half:.2f}")


if __name__ == "__main__":
    main()
