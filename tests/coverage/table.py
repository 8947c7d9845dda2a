"""The coverage tables as a page: `python -m tests.coverage.table results.jsonl docs/coverage.md [--keep]`.

With `--keep`, lines of the page stay where the results have no row for them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
import transformers

from tests.coverage.rotary import ROTARY, TRAINED

ALL_SCHEMES = "all six"
DENSE_SCHEMES = "non_shared, full_shared"
MEANING = {
    "split": "exact under `non_shared`, equal to the definition under `base_lr_shared`; all six schemes",
    "dense": "exact under `non_shared`; K or V can't be split, so `non_shared` and `full_shared` only",
    "refused": "refused by `convert`, with this reason",
    "not causal": "no decoder: a later token changes the logits of earlier ones",
    "not built": "transformers raises, with this reason, before there is a model",
    "wrong": "converts, and computes something else: a defect of ours",
    "crash": "fails with anything but a reason: a defect of ours",
}
LONGEST_REASON = 200
_COLUMNS = (" | schemes | streams | key transform | reason |", "---|---|---|---|")
_HEAD = (
    "# Coverage",
    "",
    "Every type of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, as a tiny random model with three adapters",
    "of strong random weights on all linear layers (fused experts have none), converted in memory",
    "and compared with PEFT over several turns. `make coverage` writes this page, `make coverage TYPES=bloom,mpt`",
    "some of its lines anew; `tests/coverage/` says how.",
    "",
    f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__.split('+')[0]},"
    " float32 on CPU.",
    "",
    "| verdict | types | meaning |",
    "|---|---|---|",
)
_TYPES = (
    "",
    "Streams are base K and V of a token and layer as heads x channels, and LR columns of the three agents with",
    "the number of such streams in the tiny model. A type is tested with its config's own defaults, made small:",
    "sliding windows are 8 tokens, the text 31. Options that are off by default are not covered by this table. Where",
    "transformers builds no model from the defaults, `tests/coverage/config_overrides.py` says what was changed.",
    "",
    "| type" + _COLUMNS[0],
    "|---|" + _COLUMNS[1],
)
_ROTARY = (
    "",
    "## Rotary embeddings",
    "",
    f"Kinds that `rope_parameters` may ask for, scaled from {TRAINED} trained positions on, with the whole head",
    "rotated (llama) and half of it (stablelm); compared in the same way, and with PEFT decoding one by one on its own",
    "cache (`tests/e2e/test_rotary_kinds.py`). `longrope` has other frequencies for texts longer than",
    "`original_max_position_embeddings`, `dynamic` beyond `max_position_embeddings`. There transformers rotates new",
    "keys with them and leaves cached ones, so that its answer depends on how the text was cut into calls. Our",
    "trajectories end there, and `convert` says so: up to that length they are exact. Chunked attention (llama4) ends",
    "at its first chunk in the same way.",
    "",
    "| model" + _COLUMNS[0],
    "|---|" + _COLUMNS[1],
)


def page(rows: Sequence[Mapping[str, Any]], kept: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page for all rows of a sweep.

    Args:
        kept: type -> line of an earlier page, for types without a row.
    """
    lines = {**kept, **{str(row["kind"]): _line(row) for row in rows}}
    types = {kind: line for kind, line in lines.items() if kind not in ROTARY}
    rotary = [lines[kind] for kind in ROTARY if kind in lines]
    counts = Counter(_verdict(line) for line in types.values())
    return "\n".join(
        [
            *_HEAD,
            *(f"| {verdict} | {counts[verdict]} | {meaning} |" for verdict, meaning in MEANING.items()),
            f"| total | {len(types)} | |",
            *_TYPES,
            *(types[kind] for kind in sorted(types)),
            *_ROTARY,
            *rotary,
            "",
        ]
    )


def lines_of(text: str) -> dict[str, str]:
    """Type (or kind of rotary embedding) -> its line on a page."""
    found = (re.fullmatch(r"\| ([\w -]+) \| (?:all six|non_shared, full_shared|- \([a-z ]+\)) \|.*", line)
             for line in text.splitlines())  # fmt: skip
    return {match[1]: match[0] for match in found if match}


def _verdict(line: str) -> str:
    schemes = line.split(" | ")[1]
    return {ALL_SCHEMES: "split", DENSE_SCHEMES: "dense"}.get(schemes, schemes[3:-1])


def _line(row: Mapping[str, Any]) -> str:
    schemes = {"split": ALL_SCHEMES, "dense": DENSE_SCHEMES}.get(row["verdict"], f"- ({row['verdict']})")
    reason = row["reason"].split("; layer")[0]
    reason = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."
    cells = (row["kind"], schemes, row["streams"], row["transforms"], reason)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main(arguments: Sequence[str]) -> int:
    """Writes the page; 1 if a type is wrong or crashes."""
    source, target = map(Path, arguments[:2])
    kept = lines_of(target.read_text(encoding="utf-8")) if arguments[2:] == ["--keep"] else {}
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    target.write_text(page(rows, kept), encoding="utf-8")
    bad = [row["kind"] for row in rows if row["verdict"] in ("wrong", "crash")]
    print(f"{target}: {len(rows)} types" + (f"; wrong or crashing: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
