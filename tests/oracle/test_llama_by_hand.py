"""The sharing oracle equals a second one that shares no code with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import write_model
from tests.oracle.llama_by_hand import LlamaByHand
from tests.oracle.sharing_oracle import SCHEMES, assert_schemes_differ, run_script

# Who reads what whom wrote: every pair of agents in both orders, a turn of one token, `base` before and after others, a
# cut inside the newest turn and one in older turns, turns with nothing pending, a fork right after a turn.
SCRIPT: tuple[tuple[Any, ...], ...] = (
    ("append", [5, 40, 77, 12, 90, 33, 8]),
    ("turn", "base", 1, [61]),
    ("turn", "plan", 3, [11, 29, 83]),
    ("append", [17, 23]),
    ("turn", "action", 4, [3, 99, 21, 64]),
    ("turn", "plan", 2, [70, 14]),
    ("turn", "reflect", 1, [52]),
    ("turn", "action", 4, [35, 6, 120, 9]),
    ("truncate", 21),
    ("turn", "plan", 2, [44, 101]),
    ("fork",),
    ("turn", "base", 2, [88, 2]),
    ("turn", "reflect", 3, [19, 64, 7]),
    ("truncate", 13),
    ("turn", "reflect", 2, [1, 55]),
    ("append", [4]),
    ("turn", "action", 2, [66, 31]),
)


@pytest.mark.parametrize(("targets", "shared_a"), [("all", False), ("all", True), ("qv", False), ("qv", True)])
def test_both_oracles_agree(targets: str, shared_a: bool, tmp_path: Path) -> None:
    ranks = dict.fromkeys(("plan", "action", "reflect"), 4) if shared_a else {"plan": 4, "action": 8, "reflect": 2}
    written = write_model(tmp_path, "llama", targets, shared_a, ranks, layers=3)
    results = {s: run_script(written.model_dir, written.adapters, s, SCRIPT, torch.float64) for s in SCHEMES}
    assert_schemes_differ(results)
    for scheme in SCHEMES:
        by_hand = LlamaByHand(written.model_dir, written.adapters, scheme).run(SCRIPT)
        for number, (found, expected) in enumerate(zip(results[scheme], by_hand, strict=True)):
            assert found.logprobs == pytest.approx(expected, abs=1e-9), f"{scheme}, turn {number}"
