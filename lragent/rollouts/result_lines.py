"""Turns a finished task into a line of a result file."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent.runtime import RolloutResult


def with_json_result(outcome: RolloutResult) -> RolloutResult:
    """The same outcome if its result can be written as strict JSON; otherwise an outcome with an error instead."""
    from lragent.runtime import TaskError

    try:
        json.dumps(outcome.result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as raised:
        error = TaskError(type(raised).__name__, f"the workflow's result isn't JSON: {raised}")
        return dataclasses.replace(outcome, result=None, error=error)
    return outcome


def result_line(outcome: RolloutResult) -> dict[str, Any]:
    """The line's object: id, result, error, `[agent, start, end]` of each segment, token ids, log-probabilities, usage.

    Args:
        outcome: its result is JSON (`with_json_result`).
    """
    return {
        "id": outcome.task_id,
        "result": outcome.result,
        "error": None if outcome.error is None else dataclasses.asdict(outcome.error),
        "segments": [[segment.agent, segment.start, segment.end] for segment in outcome.segments],
        "token_ids": outcome.token_ids,
        "logprobs": outcome.logprobs,
        "usage": dataclasses.asdict(outcome.usage),
    }


def generated_tokens(outcome: RolloutResult) -> int:
    """Number of tokens that agents wrote, in the trajectory as it was at the end."""
    return sum(segment.end - segment.start for segment in outcome.segments if segment.agent is not None)
