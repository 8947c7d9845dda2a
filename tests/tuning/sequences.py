"""Result lines by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAN, ACTION = "p" * 64, "a" * 64
DIGESTS = {"plan": frozenset((PLAN,)), "action": frozenset((ACTION,))}

Span = tuple[str, str | None, int, int]


def trajectory(tokens: int, *spans: Span, finish: Sequence[str] | None = None, logprobs: bool = True) -> dict[str, Any]:
    """An entry of "trajectories": token i has id i, and log-probability -i if it was generated."""
    inside = [any(start <= i < end for *_, start, end in spans) for i in range(tokens)]
    return {
        "token_ids": list(range(tokens)),
        "generated": [list(span) for span in spans],
        "logprobs": [-float(i) if flag else None for i, flag in enumerate(inside)] if logprobs else [],
        "finish_reasons": list(finish or ("stop",) * len(spans)),
    }


def line(*trajectories: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {"format": 2, "id": 1, "error": None, "reward": None, "trajectories": list(trajectories), **entries}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path
