"""Turns a finished task into a line of a result file: the format of results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lragent.errors import STOPS

if TYPE_CHECKING:
    from lragent.runtime import RolloutResult, TrajectoryRecord

FORMAT = 2
# Stands for the logarithm of 0, which JSON can't hold: the least float32. Only forced tokens have it.
LEAST = -3.4028234663852886e38


@dataclass(frozen=True)
class LinePlace:
    """The place of a line in its run.

    Args:
        run: digest of the run.
        task_index, task_digest: see `lragent.rollouts.tasks.TaskPlace`.
        attempt: 1, and one more each time that the task is run again after an error.
    """

    run: str
    task_index: int
    task_digest: str
    attempt: int = 1


def with_json_result(outcome: RolloutResult) -> RolloutResult:
    """The same outcome if its result can be written as strict JSON; otherwise an outcome with an error instead."""
    from lragent.runtime.task_error import task_error

    try:
        json.dumps(outcome.result, allow_nan=False)
    except STOPS:
        raise
    except BaseException as raised:  # also of methods of the result's objects
        error = task_error(raised, None)
        error = dataclasses.replace(error, message=f"the workflow's result isn't JSON: {error.message}")
        return dataclasses.replace(outcome, result=None, error=error)
    return outcome


def result_line(outcome: RolloutResult, place: LinePlace) -> dict[str, Any]:
    """The line's object; docs/results.md describes its entries.

    Args:
        outcome: its result is JSON (`with_json_result`).
    """
    return {
        "format": FORMAT,
        "id": outcome.task_id,
        "task_index": place.task_index,
        "sample": outcome.sample,
        "attempt": place.attempt,
        "run": place.run,
        "task_digest": place.task_digest,
        "result": outcome.result,
        "reward": reward_of(outcome.result),
        "error": None if outcome.error is None else dataclasses.asdict(outcome.error),
        "trajectories": [_trajectory(record) for record in outcome.trajectories],
        "usage": dataclasses.asdict(outcome.usage),
    }


def reward_of(result: Any) -> float | None:
    """The entry "reward" of a result that is an object, if it is a number."""
    reward = result.get("reward") if isinstance(result, dict) else None
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        return None
    try:
        return float(reward)
    except OverflowError:  # a whole number that no float can hold
        return None


def _trajectory(record: TrajectoryRecord) -> dict[str, Any]:
    return {
        "token_ids": record.token_ids,
        "generated": [list(span) for span in record.generated],
        "written": [list(span) for span in record.written],
        "logprobs": _finite(record.logprobs),
        "sampled_logprobs": _finite(record.sampled_logprobs),
        "kept_mass": record.kept_mass,
        "seeds": record.seeds,
        "finish_reasons": record.finish_reasons,
        "stop_reasons": record.stop_reasons,
    }


def _finite(logprobs: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else max(value, LEAST) for value in logprobs]


def generated_tokens(outcome: RolloutResult) -> int:
    """Number of tokens that agents wrote in the task's first trajectory, as it was at the end."""
    return sum(span.end - span.start for span in outcome.trajectories[0].generated)
