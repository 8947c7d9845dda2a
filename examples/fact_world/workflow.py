"""The plan/action/reflect workflow over one trajectory.

Works with `lragent.Trajectory` and with anything else that has `append` and `agenerate`.
"""

from typing import Any, Protocol

from examples.fact_world import format as fmt
from examples.fact_world.format import ACTION, PLAN, REFLECT
from examples.fact_world.world import Task, world_of

MAX_ROUNDS = 8


class Turn(Protocol):
    """The parts of a generated turn that the workflow reads."""

    @property
    def text(self) -> str:
        """The text without the stop string and special tokens."""
        ...

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`."""
        ...


class Trajectory(Protocol):
    """The methods of a trajectory that the workflow calls."""

    def append(self, text: str, parse_special: bool = True) -> Any:
        """Appends text, tokenised on its own; with `parse_special=False`, text of special tokens stays text."""
        ...

    async def agenerate(self, agent: str, *, max_new_tokens: int, stop: list[str], temperature: float) -> Any:
        """One turn of an agent."""
        ...


async def take_turn(t: Trajectory, role: str) -> str:
    """Header and generated text; the line is closed even if the agent ran out of tokens."""
    t.append(fmt.header(role).text)
    turn: Turn = await t.agenerate(role, max_new_tokens=fmt.MAX_NEW_TOKENS[role], stop=[fmt.STOP], temperature=0.0)
    if turn.finish_reason != "stop":
        t.append(fmt.STOP)
    return turn.text.strip()


def same_answer(left: str, right: str) -> bool:
    """Exact match, apart from case and outer spaces."""
    return left.strip().casefold() == right.strip().casefold()


async def answer_task(task: Task, t: Trajectory) -> tuple[str, int]:
    """The answer of `plan` and `action`, "" if there is none after `MAX_ROUNDS`, and the number of rounds."""
    world = world_of(task)
    t.append(fmt.opening(task["question"], task.get("notes", "")).text, parse_special=False)
    for rounds in range(1, MAX_ROUNDS + 1):
        await take_turn(t, PLAN)
        action = fmt.parse_action(await take_turn(t, ACTION))
        if action is None:
            t.append(fmt.observation(fmt.MALFORMED).text, parse_special=False)
            continue
        kind, argument = action
        if kind == "finish":
            return argument, rounds
        t.append(fmt.observation(world.lookup(argument)).text, parse_special=False)
    return "", MAX_ROUNDS


async def workflow(task: Task, t: Trajectory) -> dict[str, Any]:
    """Answers one task and reflects on the answer; never raises because of an agent's text."""
    answer, rounds = await answer_task(task, t)
    verdict = fmt.parse_verdict(await take_turn(t, REFLECT))
    exact_match = same_answer(answer, task["answer"])
    return {
        "answer": answer,
        "exact_match": exact_match,
        "verdict": verdict,
        "verdict_correct": (verdict == "right") == exact_match,
        "steps": rounds,
    }
