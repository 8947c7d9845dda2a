"""Rows of sequences of which only some turns are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lragent.training.adapter_free import parts_of
from lragent.training.rows import Rows
from lragent.training.schemes import rows_of
from lragent.training.turn_sequence import TurnSequence


def scored_rows(
    scheme: str, sequences: Sequence[TurnSequence], scored: Sequence[Sequence[bool]], agents: Sequence[str]
) -> Rows:
    """Rows of sequences under a scheme; the entries named `_R` are those of scored turns, in order.

    Args:
        scored: by sequence and turn.

    Raises:
        RequestError: see `lragent.training.schemes.rows_of`.
    """
    rows = rows_of(scheme, sequences, agents)
    flags = torch.tensor([flag for turns in scored for flag in turns])
    kept_R = flags[rows.turns_R]
    names = ("logits_rows_R", "targets_R", "target_agents_R", "turns_R")
    kept = dataclasses.replace(rows, **{name: getattr(rows, name)[kept_R] for name in names})
    return dataclasses.replace(kept, parts=parts_of(kept))
