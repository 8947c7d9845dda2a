"""Bytes that the Triton attention kernels ask for equal a formula: nothing is read twice by accident.

Run by `tests/kernels/test_triton_interpreted.py`. L = tokens that a program covers; every KV head's program reads the
LR columns and the rotation tables for itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lragent.kernels.flash_lora_attention.triton.launch import LaunchConfig, flash_lora_attention
from lragent.kernels.flash_lora_attention.triton.variants import Tiles
from tests.kernels.attention_cases import Case, tensors_of
from tests.kernels.interpreter import shim

HEADS, K_DIM, V_DIM, RANK, SIZE = 2, 32, 16, 8, 4
CASE = Case("traffic", heads=HEADS, k_dim=K_DIM, v_dim=V_DIM, ranks=(RANK, RANK, RANK), page_size=16)
# 24 rows are 8 queries of a group of 3.
PLAN = LaunchConfig(decode=Tiles(8, 32, 16, 4, 1), prefill=Tiles(24 + 8, 32, 16, 4, 1), splits=3)
QUERIES_A_BLOCK = 10


def _traffic(case: Case) -> shim.Traffic:
    call = case.build()
    with shim.watched(tensors_of(call)) as traffic:
        flash_lora_attention(call, PLAN)
    return traffic


def _expected(tokens: int, pair: bool) -> dict[str, int]:
    """Bytes for programs that cover `tokens` tokens in all; `pair`: raw keys are read with their partner channels."""
    by_head = HEADS * tokens * SIZE
    return {
        "k_cache": by_head * K_DIM * (2 if pair else 1),
        "v_cache": by_head * V_DIM,
        "lr_k": by_head * RANK,
        "lr_v": by_head * RANK,
        "rope_cos": by_head * K_DIM,
        "rope_sin": by_head * K_DIM,
    }


@pytest.mark.parametrize("final", [True, False], ids=["final", "raw"])
@pytest.mark.parametrize("window", [0, 40])
def test_decode(final: bool, window: int) -> None:
    lengths = (70, 33, 128, 5)
    case = replace(CASE, sequences=tuple((n, 1, 1) for n in lengths), final=final, window=window)
    loaded = _traffic(case).loaded
    expected = _expected(sum(min(n, window) if window else n for n in lengths), pair=not final)
    assert {name: loaded[name] for name in expected} == expected


@pytest.mark.parametrize("final", [True, False], ids=["final", "raw"])
def test_prefill(final: bool) -> None:
    case = replace(CASE, sequences=((70, 25, 1), (33, 33, 2)), final=final)
    traffic = _traffic(case)
    # Each block of queries reads up to its last query.
    ends = [min(45 + i + QUERIES_A_BLOCK, 70) for i in range(0, 25, QUERIES_A_BLOCK)]
    ends += [min(i + QUERIES_A_BLOCK, 33) for i in range(0, 33, QUERIES_A_BLOCK)]
    expected = _expected(sum(ends), pair=not final)
    assert {name: traffic.loaded[name] for name in expected} == expected
    assert traffic.stored == {"made": (25 + 33) * HEADS * CASE.group * V_DIM * SIZE}


def test_the_low_rank_cache_costs_its_rank_and_not_a_head_dim() -> None:
    loaded = _traffic(replace(CASE, sequences=((128, 1, 1),))).loaded
    assert (loaded["lr_k"] + loaded["lr_v"]) / (loaded["k_cache"] + loaded["v_cache"]) == 2 * RANK / (K_DIM + V_DIM)


def test_an_agent_of_rank_zero_reads_no_columns() -> None:
    loaded = _traffic(replace(CASE, sequences=((64, 1, 0), (30, 4, 0)))).loaded
    assert "lr_k" not in loaded and "lr_v" not in loaded


def test_unused_rows_of_a_page_table_cost_nothing() -> None:
    assert torch.equal(*(torch.tensor(_traffic(replace(CASE, sequences=s)).loaded["k_cache"]) for s in _PADDED))


_PADDED = (((64, 1, 1), (1, 1, 1)), ((1, 1, 1), (64, 1, 1)))
