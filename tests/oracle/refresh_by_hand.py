"""Selective recompute over `base_lr_shared`, written out token by token on `LlamaByHand`; nothing from lragent.

Each agent has its own list of what it reads: for a token, either what the writer held, or what the agent itself held
when it recomputed it. A `Token` is what is held of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.oracle.llama_by_hand import LlamaByHand, Token

# Acting agent and the positions that others wrote since its last turn -> those that it recomputes.
Rule = Callable[[str, Sequence[int]], Sequence[int]]


def refresh_by_hand(
    model_dir: Path, adapters: Mapping[str, Path], script: Sequence[tuple[Any, ...]], rule: Rule
) -> list[list[float]]:
    """Log-probabilities of each turn's tokens; the script has the steps "append" and "turn"."""
    llama = LlamaByHand(model_dir, adapters, "base_lr_shared")
    written: list[Token] = []
    pending: list[int] = []
    reads: dict[str, list[Token]] = {}
    results = []
    for step in script:
        if step[0] == "append":
            pending += step[1]
            continue
        _, agent, _, forced = step
        view = reads.setdefault(agent, [])
        llama.tokens = view
        found = range(len(view), len(written))
        chosen = set(rule(agent, found))
        view += [Token(written[at].id) if at in chosen else written[at] for at in found]
        for at in sorted(chosen):
            llama.process(at, agent, base=True, columns=llama.agents)
        logprobs = []
        for token in forced:
            logits = _write(llama, agent, written, pending)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            pending = [token]
        results.append(logprobs)
    return results


def _write(llama: LlamaByHand, agent: str, written: list[Token], pending: Sequence[int]) -> Tensor:
    """The agent processes new tokens: it writes them for all, and reads them itself."""
    for token_id in pending:
        token = Token(token_id)
        written.append(token)
        llama.tokens.append(token)
        logits = llama.process(len(llama.tokens) - 1, agent, base=True, columns=llama.agents)
    return logits


def early_deviations(
    model_dir: Path, adapters: Mapping[str, Path], script: Sequence[tuple[Any, ...]], layer: int
) -> dict[str, list[float]]:
    """By reader and position: squared distance of the V that it computes itself in a layer from the one that it reads
    of the writer, if all before the layer is exact."""
    ids: list[int] = []
    writers: list[str] = []
    for step in script:
        if step[0] == "append":
            ids += step[1]
        else:
            ids += step[3]
            writers += [step[1]] * (len(ids) - 1 - len(writers))
    own = {}
    for agent in dict.fromkeys(writers):
        llama = LlamaByHand(model_dir, adapters, "base_lr_shared")
        llama.tokens = [Token(token_id) for token_id in ids]
        for at in range(len(ids)):
            llama.process(at, agent, base=True, columns=llama.agents)
        own[agent] = llama
    found: dict[str, list[float]] = {}
    for reader, llama in own.items():
        pairs = [(llama.tokens[at], own[writer].tokens[at]) for at, writer in enumerate(writers)]
        values = [[llama.read(token, layer, reader, "")[1] for token in pair] for pair in pairs]
        found[reader] = [float((mine - theirs).square().sum()) for mine, theirs in values]
    return found
