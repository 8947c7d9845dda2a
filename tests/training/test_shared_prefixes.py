"""Sequences that begin alike share rows, and are computed as they are alone."""

from __future__ import annotations

import pytest
import torch

from lragent.training.schemes import SCHEME_ROWS, rows_of
from tests.oracle.sharing_oracle import SCHEMES, Step, run_script
from tests.training.conftest import SharedModels
from tests.training.scripts import SCRIPT, differences, logprobs, sequence_of

COMMON = SCRIPT[:7]
SCRIPTS: tuple[tuple[Step, ...], ...] = (
    SCRIPT,
    (*COMMON, ("turn", "reflect", 4, [88, 1, 70, 3])),  # parts from the first one in its fourth token
    (*COMMON, ("turn", "action", 3, [88, 1, 45])),  # the same tokens of another agent
    (("append", [5, 41]), ("turn", "plan", 2, [9, 9])),
    (*COMMON, ("turn", "reflect", 4, [88, 1, 70, 3])),  # the second one again
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_sequences_equal_their_definitions(scheme: str, shared_models: SharedModels) -> None:
    written, model = shared_models.get("llama")
    found = logprobs(model, rows_of(scheme, [sequence_of(script) for script in SCRIPTS], model.agents))
    exact, single = (
        [
            turn.logprobs
            for script in SCRIPTS
            for turn in run_script(written.model_dir, written.adapters, scheme, script, dtype)
        ]
        for dtype in (torch.float64, torch.float32)
    )
    assert max(differences(found, exact)) <= 4 * max(differences(single, exact))


def test_forks_have_the_rows_of_their_parents_once() -> None:
    parent, fork, other, *_ = (sequence_of(script) for script in SCRIPTS)
    agents = ("plan", "action", "reflect")
    counts = {
        name: [len(rows_of(name, some, agents).token_ids_N) for some in ([parent], [parent, fork])]
        for name in SCHEME_ROWS
    }
    # The fork has one token of its own that is processed: 70; its last one is left to the next turn.
    assert counts["base_lr_shared"][1] == counts["base_lr_shared"][0] + 1
    assert counts["full_shared"] == counts["base_lr_shared"]
    assert counts["non_shared"][1] == counts["non_shared"][0] + 1
    # Adapter-free: 70; acting: the rows that predict what follows 1 and 70, of which the parent has the first.
    assert counts["neutral_shared"][1] == counts["neutral_shared"][0] + 2
    again = rows_of("base_lr_shared", [parent, parent], agents)
    assert len(again.token_ids_N) == counts["base_lr_shared"][0]
    assert len(again.targets_R) == 2 * len(rows_of("base_lr_shared", [parent], agents).targets_R)
    assert all(len(read.queries_n) for read in again.reads)
    rows = rows_of("base_lr_shared", [parent, other], agents)
    # Another agent processes the last token of the turn before, and its own tokens but the last.
    assert len(rows.token_ids_N) == counts["base_lr_shared"][0] + 3
