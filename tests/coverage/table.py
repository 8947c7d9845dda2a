"""The coverage table as a page: `python -m tests.coverage.table results.jsonl docs/coverage.md`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ALL_SCHEMES = "all five"
DENSE_SCHEMES = "non_shared, full_shared"
MEANING = {
    "split": "exact under `non_shared`, equal to the definition under `base_lr_shared`; all five schemes",
    "dense": "exact under `non_shared`; K or V can't be split, so `non_shared` and `full_shared` only",
    "refused": "refused by `convert`, with this reason",
    "not causal": "no decoder: a later token changes the logits of earlier ones",
    "not built": "transformers can't build or run it from a small config of its own class, without us",
    "wrong": "converts, and computes something else: a defect of ours",
    "crash": "fails with anything but a reason: a defect of ours",
}
LONGEST_REASON = 200


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page for all rows of a sweep."""
    counts = Counter(row["verdict"] for row in rows)
    lines = [
        "# Coverage",
        "",
        "Every type of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, as a tiny random model with three adapters",
        "of strong random weights on all linear layers (fused experts have none), converted in memory",
        "and compared with PEFT over several turns. `make coverage` writes this page; `tests/coverage/` says how.",
        "",
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__.split('+')[0]},"
        " float32 on CPU.",
        "",
        "| verdict | types | meaning |",
        "|---|---|---|",
        *(f"| {verdict} | {counts[verdict]} | {meaning} |" for verdict, meaning in MEANING.items()),
        f"| total | {len(rows)} | |",
        "",
        "Streams are base K and V of a token and layer as heads x channels, and LR columns of the three agents with",
        "the number of such streams in the tiny model. A type is tested with its config's own defaults: options",
        "that are off by default are not covered by this table.",
        "",
        "| type | schemes | streams | key transform | reason |",
        "|---|---|---|---|---|",
        *(_line(row) for row in sorted(rows, key=lambda row: str(row["kind"]))),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    schemes = {"split": ALL_SCHEMES, "dense": DENSE_SCHEMES}.get(row["verdict"], f"- ({row['verdict']})")
    reason = row["reason"].split("; layer")[0]
    reason = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."
    cells = (row["kind"], schemes, row["streams"], row["transforms"], reason)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main(arguments: Sequence[str]) -> int:
    """Writes the page; 1 if a type is wrong or crashes."""
    source, target = map(Path, arguments)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    target.write_text(page(rows), encoding="utf-8")
    bad = [row["kind"] for row in rows if row["verdict"] in ("wrong", "crash")]
    print(f"{target}: {len(rows)} types" + (f"; wrong or crashing: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
