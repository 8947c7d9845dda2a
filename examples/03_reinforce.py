"""REINFORCE under a shared cache: the engine rolls out, `SharedModel` has the gradients. Trained adapters are saved.

    python -m examples.03_reinforce --model MODEL_DIR --work DIR

MODEL_DIR is SmolLM2-135M-Instruct. The agents of examples/fact_world start as shipped; under `base_lr_shared` most
verdicts of `reflect` are wrong. `plan` and `action` answer each task once; then forks of the trajectory sample the turn
of `reflect` on the same pages. The reward of a sample is 1 for a right verdict. Its advantage is the reward less the
mean over the samples of the task.
"""

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import lragent
from examples.fact_world import format as fmt
from examples.fact_world.workflow import answer_task, same_answer
from examples.fact_world.world import make_tasks
from lragent.loading.model import load_directories
from lragent.rollouts.turn_sequences import sequence_of

SHARING = "base_lr_shared"
ADAPTERS = {role: Path(__file__).parent / "fact_world" / "adapters" / role for role in fmt.ROLES}


async def reflections(task: Any, t: Any) -> dict[str, Any]:
    """One greedy answer, and the rewards of several reflections on it."""
    answer, _ = await answer_task(task, t)
    t.append(fmt.header(fmt.REFLECT).text)
    options = {"max_new_tokens": fmt.MAX_NEW_TOKENS[fmt.REFLECT], "stop": [fmt.STOP], "temperature": 1.0}
    turns = await asyncio.gather(*(t.fork().agenerate(fmt.REFLECT, **options) for _ in range(task["samples"])))
    expected = "right" if same_answer(answer, task["answer"]) else "wrong"
    return {"rewards": [float(fmt.parse_verdict(turn.text) == expected) for turn in turns]}


def samples_of(outcome: Any) -> list[tuple[Any, list[Any], float]]:
    """Sequence, log-probabilities of its last turn, and advantage of the samples of a task that differ from its mean.

    The first trajectory is the one that the others forked from.
    """
    rewards = outcome.result["rewards"]
    mean = statistics.mean(rewards)
    pairs = zip(outcome.trajectories[1:], rewards, strict=True)
    found = [(sequence_of(record), record.logprobs, reward - mean) for record, reward in pairs if reward != mean]
    return [(sequence, logprobs[sequence.turns[-1].start :], a) for sequence, logprobs, a in found if sequence]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".reinforce"))
    for name, default in (("--steps", 40), ("--tasks", 4), ("--samples", 8), ("--learning-rate", 4e-4)):
        parser.add_argument(name, type=type(default), default=default)
    options = parser.parse_args()
    artifact = options.work / "agents.lragent"
    if not artifact.exists():
        lragent.convert(options.model, ADAPTERS, artifact, layouts=("split",))
    engine = lragent.load(artifact, sharing=SHARING)
    loaded = load_directories(options.model, ADAPTERS)
    model = lragent.SharedModel.of_model(loaded)
    trained = [p for agents in model.pairs.values() if fmt.REFLECT in agents for p in agents[fmt.REFLECT]]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    pool = [{**task, "samples": options.samples} for task in make_tasks("train", options.steps * options.tasks)]
    means: list[float] = []
    for step in range(options.steps):
        tasks = pool[step * options.tasks :][: options.tasks]
        outcomes: list[Any] = [one for one in engine.run(reflections, tasks, seed=step) if one.error is None]
        means.append(statistics.mean(reward for outcome in outcomes for reward in outcome.result["rewards"]))
        samples = [sample for outcome in outcomes for sample in samples_of(outcome)]
        apart = 0.0
        if samples:
            sequences, rolled, advantages = zip(*samples, strict=True)
            scored = [[False] * (len(sequence.turns) - 1) + [True] for sequence in sequences]
            rows = lragent.rows_of(SHARING, sequences, model.agents, scored)
            logprobs_R = model(rows).log_softmax(-1).gather(1, rows.targets_R[:, None])[:, 0]
            apart = float((logprobs_R.detach() - torch.tensor([p for part in rolled for p in part])).abs().mean())
            advantages_R = torch.tensor([a for a, part in zip(advantages, rolled, strict=True) for _ in part])
            (-(advantages_R * logprobs_R).sum() / len(samples)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            engine.update_adapters({agent: model.adapter_weights(agent) for agent in model.agents})
        print(json.dumps({"step": step, "reward": means[-1], "samples": len(samples), "apart": apart}), flush=True)
    lragent.save_adapters(loaded, model, options.work / "adapters", SHARING, options.steps)
    for name, part in (("first", means[:20]), ("last", means[-20:])):
        half = 1.96 * statistics.stdev(part) / len(part) ** 0.5 if len(part) > 1 else float("nan")
        print(f"mean reward of the {name} {len(part)} steps: {statistics.mean(part):.2f} +- {half:.2f}")


if __name__ == "__main__":
    main()
