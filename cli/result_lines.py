"""What a finished task looks like as a line of a result file."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent.runtime import RolloutResult


def result_line(outcome: RolloutResult) -> dict[str, Any]:
    """Result or error, who wrote which tokens, and what was computed; a result that isn't JSON becomes an error."""
    result = outcome.result
    error = None if outcome.error is None else dataclasses.asdict(outcome.error)
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as raised:
        result, error = None, {"type": type(raised).__name__, "message": f"the workflow's result isn't JSON: {raised}"}
    return {
        "id": outcome.task_id,
        "result": result,
        "error": error,
        "segments": [[segment.agent, segment.start, segment.end] for segment in outcome.segments],
        "token_ids": outcome.token_ids,
        "logprobs": outcome.logprobs,
        "usage": dataclasses.asdict(outcome.usage),
    }


def generated_tokens(outcome: RolloutResult) -> int:
    """Tokens that agents wrote, in the trajectory as it was at the end."""
    return sum(segment.end - segment.start for segment in outcome.segments if segment.agent is not None)
