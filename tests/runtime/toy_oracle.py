"""The sharing schemes by definition, for the toy model: token by token, no pages, no cache reuse, no batching.

It imports nothing from lragent. A trajectory's streams are lists by position; a pass says what it keeps.
"""

from __future__ import annotations

import copy

import torch

from tests.runtime.toy_program import AGENTS, HEAD_DIM, HEADS, ToyModel, attend

NAMES = ("base", *AGENTS)


class Streams:
    """K, V and LR columns by layer and position; LR also by agent id."""

    def __init__(self, layers: int) -> None:
        self.k: list[dict[int, torch.Tensor]] = [{} for _ in range(layers)]
        self.v: list[dict[int, torch.Tensor]] = [{} for _ in range(layers)]
        self.lr: list[dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in range(layers)]


class OracleTrajectory:
    def __init__(self, model: ToyModel, scheme: str, tokens: list[int]) -> None:
        self.model, self.scheme = model, scheme
        self.tokens = list(tokens)
        owners = range(len(NAMES)) if scheme == "non_shared" else [0]
        self.streams = {owner: Streams(len(model.layers)) for owner in owners}
        self.processed = {owner: 0 for owner in owners}
        self.seen = {agent: 0 for agent in range(len(NAMES))}  # base_shared: LR columns
        self.unsettled: tuple[int, int] | None = None  # rebase_shared: agent, first token

    def fork(self) -> OracleTrajectory:
        self.settle()
        other = copy.copy(self)
        other.tokens = list(self.tokens)
        other.processed, other.seen = dict(self.processed), dict(self.seen)
        other.streams = {}
        for owner, streams in self.streams.items():
            other.streams[owner] = Streams(0)
            for name in ("k", "v", "lr"):
                setattr(other.streams[owner], name, [dict(part) for part in getattr(streams, name)])
        return other

    def truncate(self, length: int) -> None:
        del self.tokens[length:]
        self.processed = {owner: min(count, length) for owner, count in self.processed.items()}
        self.seen = {agent: min(count, length) for agent, count in self.seen.items()}

    def run_token(self, at: int, agent: int, base: bool, columns: set[int]) -> torch.Tensor:
        """One token by one agent; keeps base and columns as asked. Logits `[V]`."""
        streams = self.streams[agent if self.scheme == "non_shared" else 0]
        dense = self.scheme in ("non_shared", "full_shared")
        x = self.model.inputs(torch.tensor([self.tokens[at]]), torch.tensor([at]))
        for index, layer in enumerate(self.model.layers):
            q = x @ (layer.w_q + layer.delta_q[agent])
            if base:
                k, v = x @ layer.w_k, x @ layer.w_v
                if dense:
                    k = k + x @ layer.a_k[agent].T @ layer.b_k[agent]
                    v = v + x @ layer.a_v[agent].T @ layer.b_v[agent]
                streams.k[index][at], streams.v[index][at] = k[0], v[0]
            for other in columns:
                streams.lr[index][at, other] = ((x @ layer.a_k[other].T)[0], (x @ layer.a_v[other].T)[0])
            k = torch.stack([streams.k[index][j] for j in range(at + 1)])
            v = torch.stack([streams.v[index][j] for j in range(at + 1)])
            if agent and not dense:
                k = k + torch.stack([streams.lr[index][j, agent][0] for j in range(at + 1)]) @ layer.b_k[agent]
                v = v + torch.stack([streams.lr[index][j, agent][1] for j in range(at + 1)]) @ layer.b_v[agent]
            assert k.shape[1] == HEADS * HEAD_DIM
            x = self.model.after_attention(layer, x, attend(q, k, v, torch.tensor([at])))
        return (x @ self.model.head)[0].float()

    def settle(self) -> None:
        if self.unsettled is None:
            return
        writer, start = self.unsettled
        for at in range(start, self.processed[0]):
            self.run_token(at, 0, base=True, columns={1, 2, 3} - {writer})
        self.unsettled = None

    def process(self, agent: int) -> torch.Tensor | None:
        """Processes pending tokens by `agent`; logits of the last one, None if the agent ran none.

        Under neutral_shared `base` runs them, whoever acts.
        """
        owner = agent if self.scheme == "non_shared" else 0
        logits = None
        if self.scheme == "base_shared" and agent:
            for at in range(self.seen[agent], self.processed[0]):
                logits = self.run_token(at, agent, base=False, columns={agent})
        for at in range(self.processed[owner], len(self.tokens)):
            columns = {1, 2, 3}
            if self.scheme == "base_shared":
                columns = {agent} - {0}
            elif self.scheme in ("non_shared", "full_shared"):
                columns = set()
            writer = 0 if self.scheme == "neutral_shared" else agent
            found = self.run_token(at, writer, base=True, columns=columns)
            logits = found if writer == agent else None
            self.processed[owner] = at + 1
        if self.scheme == "base_shared":
            self.seen[agent] = len(self.tokens)
        return logits

    def turn(self, name: str, count: int, forced: list[int] | None = None) -> tuple[list[int], list[float]]:
        agent = NAMES.index(name)
        self.settle()
        start = self.processed[0] if self.scheme == "rebase_shared" else 0
        tokens: list[int] = []
        logprobs: list[float] = []
        for step in range(count):
            logits = self.process(agent)
            if logits is None:
                logits = self.run_token(len(self.tokens) - 1, agent, base=False, columns=set())
            token = int(logits.argmax()) if forced is None else forced[step]
            tokens.append(token)
            logprobs.append(float(logits.log_softmax(0)[token]))
            self.tokens.append(token)
        if self.scheme == "rebase_shared" and agent and self.processed[0] > start:
            self.unsettled = (agent, start)
        return tokens, logprobs

    def score(self, name: str, tokens: list[int]) -> list[float]:
        return self.fork().turn(name, len(tokens), tokens)[1]
