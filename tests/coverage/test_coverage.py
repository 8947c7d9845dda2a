"""Unusual types, each for something that no other has, by verdict; and every type, where slow tests are asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.coverage.rotary import ROTARY
from tests.coverage.sweep import examine_apart
from tests.coverage.table import lines_of, page
from tests.coverage.tiny_model import types

# Type -> verdict and words of its reason.
UNUSUAL = {
    "bloom": ("split", ""),  # written-out attention with slopes, fused q, k, v
    "falcon": ("split", ""),  # PyTorch's attention op, one KV head, linear layers of its own class
    "gpt_neo": ("split", ""),  # written-out attention, a sliding window from a table of masks
    "bart": ("split", ""),  # counts positions itself, from 2
    "roberta": ("split", ""),  # starts at 2 unless it is told
    "rembert": ("split", ""),  # a projection reads another's output as it is
    "deepseek_v3": ("split", ""),  # latent attention: a key of two projections; writes in place; experts
    "olmo2": ("split", ""),  # one norm over all heads before the rotation
    "gpt_oss": ("split", ""),  # sinks, sliding window, experts with biases
    "gemma4_text": ("dense", "value passes through a computation that is not linear"),
    "qwen3_next": ("refused", "mixes tokens outside attention"),
    "doge": ("refused", "mask or bias of its own"),
    "xlnet": ("not causal", "later token"),
}
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_types(kind: str) -> None:
    verdict, words = UNUSUAL[kind]
    row = examine_apart(kind)
    assert row["verdict"] == verdict, row
    assert words in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", types())
def test_every_type(kind: str) -> None:
    row = examine_apart(kind)
    assert row["verdict"] not in ("wrong", "crash"), row


def test_page_lists_every_type_of_its_transformers() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"^\| (wrong|crash) \| [1-9]", text, re.M)
    if f"transformers {transformers.__version__}," in text:
        assert re.findall(r"^\| ([\w-]+) \| (?:all|non|- )", text, re.M) == types()


def test_page_lists_every_kind_of_rotary_embedding() -> None:
    held = lines_of(PAGE.read_text(encoding="utf-8"))
    assert all(f"| {row} | all six |" in held[row] for row in ROTARY)


def test_page_counts_verdicts_and_keeps_reasons_short() -> None:
    row = {"kind": "a", "verdict": "dense", "reason": "x" * 300 + "; layer 1", "streams": "", "transforms": ""}
    text = page([row])
    assert "| dense | 1 |" in text
    line = lines_of(text)["a"]
    assert line.startswith("| a | non_shared, full_shared |") and "..." in line and "layer 1" not in line


def test_page_keeps_lines_without_a_row() -> None:
    old = PAGE.read_text(encoding="utf-8")
    held = lines_of(old)
    row = {"kind": "bloom", "verdict": "not built", "reason": "so", "streams": "", "transforms": ""}
    new = page([row], held)
    assert lines_of(new) == {**held, "bloom": "| bloom | - (not built) |  |  | so |"}
    assert _without_versions(page([], held)) == _without_versions(old)


def _without_versions(page: str) -> list[str]:
    """Lines of the page but the one that names the installed versions."""
    return [line for line in page.splitlines() if not line.startswith("transformers ")]
