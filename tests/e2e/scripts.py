"""One script of turns, run on an engine and by the oracle, and what they may differ by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lragent.runtime.engine import Engine
from tests.models import WrittenModel
from tests.oracle.sharing_oracle import Step, TurnResult, assert_schemes_differ, run_script

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61, 102, 55, 7, 19, 64, 3, 118, 27, 81, 46, 9, 30]
# plan -> action -> plan on one page, base in between, turns after others have written.
SCRIPT: tuple[Step, ...] = (
    ("append", PROMPT),
    ("turn", "plan", 5, None),
    ("append", [17, 23]),
    ("turn", "action", 4, None),
    ("turn", "plan", 5, None),
    ("append", [91, 14, 66, 2, 39]),
    ("turn", "base", 3, None),
    ("turn", "reflect", 4, None),
    ("truncate", 37),
    ("turn", "action", 4, None),
    ("fork",),
    ("turn", "plan", 4, None),
)


def run_on_engine(engine: Engine, script: Sequence[Step]) -> list[Any]:
    """Turns of a script on one trajectory; every fork and the original are closed."""
    turns = []
    trajectories = [engine.trajectory()]
    for step in script:
        t = trajectories[-1]
        if step[0] == "append":
            t.append(step[1])
        elif step[0] == "turn":
            turns.append(t.generate(step[1], max_new_tokens=step[2], forced=step[3], ignore_eos=True))
        elif step[0] == "truncate":
            t.truncate(step[1])
        else:
            trajectories.append(t.fork())
        engine.check_integrity()
    for t in trajectories:
        t.close()
    return turns


def forced(script: Sequence[Step], turns: Sequence[Any]) -> list[Step]:
    """The script with each turn's tokens given."""
    left = iter(turns)
    return [(*step[:3], next(left).token_ids) if step[0] == "turn" else step for step in script]


def assert_equals_oracle(written: WrittenModel, scheme: str, script: Sequence[Step], turns: Sequence[Any]) -> None:
    """Log-probabilities are the float64 oracle's up to four times what the float32 oracle differs from it; a greedy
    token may differ only where float64 itself is that undecided."""
    given = forced(script, turns)
    exact = run_script(written.model_dir, written.adapters, scheme, given, torch.float64)
    single = run_script(written.model_dir, written.adapters, scheme, given, torch.float32)
    allowed = 4 * largest_difference(single, exact)
    assert largest_difference(turns, exact) <= allowed
    for turn, result in zip(turns, exact, strict=True):
        for token, best, gap in zip(turn.token_ids, result.likeliest, result.gaps, strict=True):
            assert token == best or gap < allowed


def largest_difference(left: Sequence[Any], right: Sequence[Any]) -> float:
    return max(
        abs(x - y) for a, b in zip(left, right, strict=True) for x, y in zip(a.logprobs, b.logprobs, strict=True)
    )


def require_schemes_differ(
    written: WrittenModel, script: Sequence[Step], turns: Sequence[Any], schemes: Sequence[str]
) -> dict[str, list[TurnResult]]:
    """Guards a test: on its input the schemes are told apart."""
    given = forced(script, turns)
    results = {s: run_script(written.model_dir, written.adapters, s, given, torch.float64) for s in schemes}
    assert_schemes_differ(results)
    return results
