"""Random operations on an engine, each checked against the oracle, which has no cache, no batches and no memory."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import torch

from lragent.errors import InternalError
from lragent.runtime import Engine, EngineConfig, Trajectory
from tests.runtime.toy_oracle import NAMES, OracleTrajectory
from tests.runtime.toy_program import VOCAB, toy_model, toy_program

SCHEMES = ("non_shared", "full_shared", "base_shared", "base_lr_shared", "rebase_shared", "neutral_shared")
MODEL = toy_model()
TOLERANCE = 5e-6  # float32 logits of a float64 model
LONGEST = 48
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7, 8, 30], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]


def toy_engine(scheme: str, pages: int = 500, page_size: int = 4, max_batch_tokens: int = 512) -> Engine:
    """An engine with that many pages that can be held, whose books are checked after every step."""
    program = toy_program("dense" if scheme in ("non_shared", "full_shared") else "split", MODEL)
    config = EngineConfig(scheme, "10MB", max_batch_tokens, page_size, torch.float64)
    one = Engine(program, config)
    engine = Engine(program, replace(config, kv_memory=one.stats().page_bytes * (pages + 1)))
    engine.on_step = SteadyCheck(engine)
    return engine


class SteadyCheck:
    """Checks the books; once they were wrong it fails for good, so that no later call can hide it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._error: InternalError | None = None

    def __call__(self) -> None:
        try:
            self._engine.check_integrity()
        except InternalError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error


def assert_same(turn: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    assert turn[0] == expected[0]
    assert max(abs(a - b) for a, b in zip(turn[1], expected[1], strict=True)) < TOLERANCE


class Session:
    """Pairs of trajectory and oracle, and the operations on them."""

    def __init__(self, engine: Engine, seed: int, most: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.most = most
        self.pairs: list[tuple[Trajectory, OracleTrajectory]] = []

    def new(self) -> None:
        prompt = self.random.choice(PROMPTS)
        if len(self.pairs) < self.most:
            oracle = OracleTrajectory(MODEL, self.engine.sharing, prompt)
            self.pairs.append((self.engine.trajectory(prompt), oracle))

    def turns(self) -> None:
        """Some trajectories get a turn at the same time, at random agents and lengths."""
        chosen = [pair for pair in self.pairs if len(pair[0]) < LONGEST - 14 and self.random.random() < 0.7]
        plans = [(self.random.choice(NAMES), self.random.choice((1, 3, 8, 14))) for _ in chosen]

        async def all_turns() -> list[tuple[list[int], list[float]]]:
            turns = [t.agenerate(name, max_new_tokens=n) for (t, _), (name, n) in zip(chosen, plans, strict=True)]
            return [(turn.token_ids, turn.logprobs) for turn in await asyncio.gather(*turns)]

        for turn, (_, oracle), plan in zip(asyncio.run(all_turns()), chosen, plans, strict=True):
            assert_same(turn, oracle.turn(*plan))

    def append(self) -> None:
        for trajectory, oracle in self.pairs:
            if self.random.random() < 0.3 and len(trajectory) < LONGEST - 10:
                piece = [self.random.randrange(VOCAB) for _ in range(self.random.randint(1, 6))]
                trajectory.append(piece)
                oracle.tokens += piece

    def truncate(self) -> None:
        trajectory, oracle = self.random.choice(self.pairs)
        length = self.random.randint(max(1, len(trajectory) - 12), len(trajectory))
        trajectory.truncate(length)
        oracle.truncate(length)

    def fork(self) -> None:
        trajectory, oracle = self.random.choice(self.pairs)
        if len(self.pairs) < self.most:
            self.pairs.append((trajectory.fork(), oracle.fork()))

    def score(self) -> None:
        trajectory, oracle = self.random.choice(self.pairs)
        if len(trajectory) < LONGEST - 5:
            name = self.random.choice(NAMES)
            tokens = [self.random.randrange(VOCAB) for _ in range(self.random.randint(1, 5))]
            assert_same((tokens, trajectory.score(name, tokens)), (tokens, oracle.score(name, tokens)))

    def close(self) -> None:
        trajectory, _ = self.pairs.pop(self.random.randrange(len(self.pairs)))
        trajectory.close()

    def run(self, operations: int) -> None:
        choices = [self.new, self.turns, self.append, self.truncate, self.fork, self.score, self.close]
        for _ in range(operations):
            operation = self.random.choices(choices, weights=(3, 6, 3, 2, 2, 1, 2))[0] if self.pairs else self.new
            operation()
            self.check()
            for trajectory, oracle in self.pairs:
                assert trajectory.token_ids == oracle.tokens
        for trajectory, _ in self.pairs:
            trajectory.close()
        stats = self.engine.stats()
        assert stats.pages_held == 0 and stats.held_bytes == 0
        self.check()

    def check(self) -> None:
        assert self.engine.on_step is not None
        self.engine.on_step()
