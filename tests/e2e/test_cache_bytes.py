"""Cache bytes, counted from held pages, are those of the schemes' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lragent.program.cache_schema import BaseStreams, CacheSchema, LowRankStream
from lragent.runtime.engine import Engine
from lragent.runtime.schemes import SCHEMES
from tests.e2e.conftest import Artifacts

PAGE = 32
TOKENS = 4 * PAGE
LAYERS, D_KV = 2, 2 * 16  # the tiny llama: two layers, two KV heads of sixteen


def _formula(scheme: str, ranks: tuple[int, ...], distinct: int, adapted: int) -> int:
    """Numbers a token and layer once all agents have seen it; `adapted`: how many of K and V have adapters."""
    dense = 2 * D_KV
    return {
        "non_shared": len(ranks) * dense,
        "full_shared": dense,
        "base_lr_shared": dense + adapted * distinct,
        "base_shared": dense + adapted * sum(ranks),
        "rebase_shared": dense + adapted * sum(ranks),
        "neutral_shared": dense + adapted * distinct,
    }[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("targets", "adapted"), [("qv", 1), ("all", 2)])
@pytest.mark.parametrize("shared_a", [False, True], ids=["different-A", "shared-A"])
def test_peak_equals_the_formula(
    scheme: str,
    targets: str,
    adapted: int,
    shared_a: bool,
    artifacts: Artifacts,
    open_engine: Callable[..., Engine],
) -> None:
    _, artifact = artifacts.get("llama", targets, shared_a)
    engine = open_engine(artifact, scheme)
    with engine.trajectory([(7 * j) % 120 for j in range(TOKENS)]) as t:
        for agent in ("plan", "action", "reflect"):  # the last token of each turn stays unprocessed
            t.generate(agent, max_new_tokens=1, ignore_eos=True)
            t.truncate(TOKENS)
    ranks = (4, 4, 4) if shared_a else (4, 8, 4)
    distinct = 4 if shared_a else sum(ranks)
    assert engine.stats().peak_held_bytes == TOKENS * LAYERS * 4 * _formula(scheme, ranks, distinct, adapted)


@pytest.mark.parametrize(("group", "bound"), [((0, 0, 0), 0.345), ((0, 1, 2), 0.36)], ids=["shared-A", "different-A"])
def test_smollm2_shares_to_a_third(group: tuple[int, ...], bound: float) -> None:
    """Three agents at rank 8 on q and v of SmolLM2-135M: thirty layers, three KV heads of 64."""
    base = tuple(BaseStreams(i, 3, 64, 64) for i in range(30))
    streams = tuple(LowRankStream(f"v{i}", (8, 8, 8), group) for i in range(30))
    split = CacheSchema("split", ("plan", "action", "reflect"), base, streams)
    lr_blocks = SCHEMES["base_lr_shared"].lr_blocks
    shared = split.base_numbers_per_token() + sum(split.lr_numbers_per_token(a, lr_blocks) for a in range(3))
    assert shared / (3 * split.base_numbers_per_token()) <= bound
