import json
import math
from typing import Any

import pytest

from lragent.rollouts.result_lines import LEAST, LinePlace, result_line, reward_of, with_json_result
from lragent.runtime import AgentSpan, ErrorCause, RolloutResult, TaskError, TrajectoryRecord, Usage

PLACE = LinePlace("0123456789ab", 4, "89abcdef01234567", 2)
RECORD = TrajectoryRecord(
    token_ids=[5, 6, 7, 8],
    generated=[AgentSpan("plan", "d1", 1, 3)],
    written=[AgentSpan("plan", "d1", 0, 2), AgentSpan("act", "d2", 2, 3)],
    logprobs=[None, -0.5, -math.inf, None],
    sampled_logprobs=[None, -0.25, None, None],
    kept_mass=[None, 0.75, None, None],
    seeds=[11],
    finish_reasons=["stop"],
    stop_reasons=["\n"],
)


def outcome(result: Any = None, error: TaskError | None = None) -> RolloutResult:
    return RolloutResult(0, "a", 0, result, error, [RECORD, RECORD], Usage(prefill=3))


def test_a_line_has_these_entries_and_no_others() -> None:
    line = result_line(outcome({"reward": 1, "said": "\u00fc"}), PLACE)
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    trajectory = {
        "token_ids": [5, 6, 7, 8],
        "generated": [["plan", "d1", 1, 3]],
        "written": [["plan", "d1", 0, 2], ["act", "d2", 2, 3]],
        "logprobs": [None, -0.5, LEAST, None],
        "sampled_logprobs": [None, -0.25, None, None],
        "kept_mass": [None, 0.75, None, None],
        "seeds": [11],
        "finish_reasons": ["stop"],
        "stop_reasons": ["\n"],
    }
    usage = line.pop("usage")
    assert usage["prefill"] == 3 and usage["ttft"] == 0.0
    assert line == {
        "format": 2,
        "id": "a",
        "task_index": 4,
        "sample": 0,
        "attempt": 2,
        "run": "0123456789ab",
        "task_digest": "89abcdef01234567",
        "result": {"reward": 1, "said": "\u00fc"},
        "reward": 1.0,
        "error": None,
        "trajectories": [trajectory, trajectory],
    }


def test_an_error_has_four_entries() -> None:
    error = TaskError("KeyError", "'a'", "Traceback ...", (ErrorCause("OSError", "gone"),))
    assert json.loads(json.dumps(result_line(outcome(error=error), PLACE)["error"])) == {
        "type": "KeyError",
        "message": "'a'",
        "traceback": "Traceback ...",
        "causes": [{"type": "OSError", "message": "gone"}],
    }


@pytest.mark.parametrize(
    ("result", "reward"),
    [
        ({"reward": 2}, 2.0),
        ({"reward": -0.5}, -0.5),
        ({"reward": True}, None),
        ({"reward": "1"}, None),
        ({"reward": 10**400}, None),
        ({}, None),
    ],
)
def test_a_reward_is_a_number_or_null(result: Any, reward: float | None) -> None:
    assert reward_of(result) == reward and isinstance(reward_of(result), float | None)
    assert reward_of([result]) is None and reward_of(None) is None


class Broken(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise LookupError("closed")


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ({"a": {1}}, "TypeError"),
        ({"a": math.nan}, "ValueError"),
        ({(1, 2): 3}, "TypeError"),
        (Broken(a=1), "LookupError"),
    ],
)
def test_a_result_that_is_no_json_is_the_tasks_error(result: Any, found: str) -> None:
    checked = with_json_result(outcome(result))
    assert checked.result is None and checked.error is not None
    assert checked.error.type == found and "isn't JSON" in checked.error.message
    assert checked.trajectories == [RECORD, RECORD]
