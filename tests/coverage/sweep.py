"""Runs `examine` over many types, one forked process each with a time limit; results are written as they come.

python -m tests.coverage.sweep --out results.jsonl [--types bloom,mpt] [--limit 300]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.coverage.compare import Row, examine
from tests.coverage.rotary import ROTARY
from tests.coverage.tiny_model import types

LIMIT_SECONDS = 300.0


def _child(kind: str, queue: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        queue.put(examine(kind).to_json())
    except BaseException as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
        text = (str(error).strip().splitlines() or [""])[0][:300]
        queue.put(Row(kind, "crash", f"{type(error).__name__}: {text} ({' '.join(frames)})").to_json())


def examine_apart(kind: str, limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """The row of one type, from a process of its own."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    child = context.Process(target=_child, args=(kind, queue), daemon=True)
    child.start()
    child.join(limit)
    if child.is_alive():
        child.kill()
        child.join()
        return Row(kind, "crash", f"took longer than {limit:.0f} s").to_json()
    if queue.empty():
        return Row(kind, "crash", f"the process ended with {child.exitcode}").to_json()
    row: dict[str, Any] = queue.get()
    return row


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS)
    options = parser.parse_args(arguments)
    wanted = options.types.split(",") if options.types else [*types(), *ROTARY]
    with options.out.open("w", encoding="utf-8") as out:
        for kind in wanted:
            row = examine_apart(kind, options.limit)
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(f"{kind:26} {row['verdict']:10} {row['seconds']:5} {row['reason'][:150]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
