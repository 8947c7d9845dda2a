"""Batches, chunks, forks and lack of memory change when things are computed, never what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lragent.runtime.engine import Engine
from tests.e2e.conftest import Artifacts
from tests.oracle.sharing_oracle import SCHEMES

PROMPTS = [[(7 * i + 13 * j + 5) % 120 for j in range(9 + 11 * i)] for i in range(5)]
COMMON = [(5 * j + 3) % 120 for j in range(40)]


async def _trajectory(engine: Engine, index: int) -> list[list[int]]:
    """Several agents in turn, a fork inside a page, tool results of odd lengths."""
    order = ["plan", "action", "reflect", "base", "plan"][index % 3 :]
    turns: list[list[int]] = []
    with engine.trajectory() as t:
        t.append(COMMON + PROMPTS[index])
        for i, agent in enumerate(order):
            turn = await t.agenerate(agent, max_new_tokens=4 + i, ignore_eos=True)
            turns.append(turn.token_ids)
            t.append([(11 * i + index) % 120] * (3 + 5 * i))
            engine.check_integrity()
        with t.fork() as branch:
            left, right = await asyncio.gather(
                t.agenerate("action", max_new_tokens=5, ignore_eos=True),
                branch.agenerate("plan", max_new_tokens=5, ignore_eos=True),
            )
            turns += [left.token_ids, right.token_ids]
            branch.truncate(len(COMMON) + 3)
            again = await branch.agenerate("reflect", max_new_tokens=3, ignore_eos=True)
            turns.append(again.token_ids)
    return turns


async def _together(engine: Engine) -> list[list[list[int]]]:
    return await asyncio.gather(*(_trajectory(engine, i) for i in range(len(PROMPTS))))


def run_together(engine: Engine) -> list[list[list[int]]]:
    """All trajectories at once."""
    return asyncio.run(_together(engine))


@pytest.fixture(scope="module")
def plain_runs(artifacts: Artifacts) -> dict[str, Any]:
    return {}


def _plain(
    scheme: str, plain_runs: dict[str, Any], artifacts: Artifacts, open_engine: Callable[..., Engine]
) -> list[list[list[int]]]:
    """Each trajectory alone in a fresh engine with plenty of memory."""
    if scheme not in plain_runs:
        _, artifact = artifacts.get("llama")
        plain_runs[scheme] = [asyncio.run(_trajectory(open_engine(artifact, scheme), i)) for i in range(len(PROMPTS))]
    return plain_runs[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_together_as_alone(
    scheme: str, plain_runs: dict[str, Any], artifacts: Artifacts, open_engine: Callable[..., Engine]
) -> None:
    _, artifact = artifacts.get("llama")
    engine = open_engine(artifact, scheme)
    assert run_together(engine) == _plain(scheme, plain_runs, artifacts, open_engine)
    assert engine.stats().preemptions == 0
    assert engine.stats().tokens.reused > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_small_chunks_and_little_memory(
    scheme: str, plain_runs: dict[str, Any], artifacts: Artifacts, open_engine: Callable[..., Engine]
) -> None:
    """Room for about two trajectories, and steps of at most 17 tokens, so that chunks end inside pages."""
    _, artifact = artifacts.get("llama")
    plain = _plain(scheme, plain_runs, artifacts, open_engine)
    page_bytes = open_engine(artifact, scheme).stats().page_bytes
    pages = 30 if scheme == "non_shared" else 14
    engine = open_engine(artifact, scheme, kv_memory=pages * page_bytes, max_batch_tokens=17)
    engine.on_step = engine.check_integrity
    assert run_together(engine) == plain
    stats = engine.stats()
    assert stats.preemptions + stats.dropped_tables > 0
    assert stats.tokens.replay > 0 or scheme == "non_shared"
    assert stats.pages_held == 0
