"""Next tokens from logits, vectorised over the rows of a step.

Legend: R = rows, V = vocabulary. The sample of a row depends on its logits, options, seed and position only, never on
the rest of the batch: one uniform number comes from a hash of (seed, position) and is looked up in the row's cumulative
distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Below it, finite float32 logits divided by the temperature may exceed the range of float64: the turn is greedy.
GREEDY = torch.finfo(torch.float32).max / torch.finfo(torch.float64).max


@dataclass(frozen=True)
class SamplingRow:
    """Sampling options of one row; fields as in `turn.TurnOptions`.

    Args:
        position: position in the trajectory of the token to sample.
        forced: token to take instead of a sample.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int
    forced: int | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 bits."""
    text = f"{seed}:{position}".encode()
    bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return float(bits >> 11) / float(1 << 53)


def log_totals(logits_RV: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exponentials `[R]` of each row, in float32.

    It is finite if a token can be taken from the row: some logit is finite, and none is NaN or +inf. A logit of -inf
    excludes its token, which is legal.
    """
    return logits_RV.float().logsumexp(dim=1)


def log_probabilities(logits_RV: torch.Tensor, tokens_R: torch.Tensor, totals_R: torch.Tensor) -> list[float]:
    """Natural log-probability of one token per row, in float32, before temperature and filters.

    Args:
        totals_R: result of `log_totals`.
    """
    chosen_R = logits_RV.float().gather(1, tokens_R[:, None])[:, 0]
    result: list[float] = (chosen_R - totals_R).tolist()
    return result


@dataclass(frozen=True)
class Samples:
    """Tokens `[R]` int64, and by row the facts of its draw (`turn.Turn`)."""

    tokens_R: torch.Tensor
    logprobs: list[float | None]
    kept_mass: list[float | None]


def sample(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> Samples:
    """Takes a token per row: the forced one, the most likely one, or one that is drawn.

    Args:
        logits_RV: rows whose `log_totals` are finite.
    """
    tokens_R = logits_RV.argmax(dim=1)
    logprobs: list[float | None] = [None if row.forced is not None else 0.0 for row in rows]
    kept_mass: list[float | None] = [None if row.forced is not None else 1.0 for row in rows]
    drawn = [index for index, row in enumerate(rows) if row.temperature > GREEDY and row.forced is None]
    if drawn:
        where = torch.tensor(drawn, device=logits_RV.device)
        tokens_R[where], found = _draw(logits_RV[where], [rows[index] for index in drawn])
        for index, (logprob, kept) in zip(drawn, found.tolist(), strict=True):
            logprobs[index], kept_mass[index] = logprob, kept
    forced = [(index, row.forced) for index, row in enumerate(rows) if row.forced is not None]
    if forced:
        where, values = torch.tensor(forced, device=logits_RV.device).T
        tokens_R[where] = values
    return Samples(tokens_R, logprobs, kept_mass)


def _draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn tokens `[R]`; their log-probabilities after filters and the probability that filters kept `[R, 2]`."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    # float64: a cumulative sum over a large vocabulary must not lose the tail.
    probs_RV = (logits_RV.double() / column([row.temperature for row in rows])).softmax(dim=1)
    if any(row.top_k > 0 or row.top_p < 1 for row in rows):
        probs_RV = _top_filters(probs_RV, rows)
    if any(row.min_p > 0 for row in rows):
        least_R1 = column([row.min_p for row in rows]) * probs_RV.amax(dim=1, keepdim=True)
        probs_RV = probs_RV.masked_fill(probs_RV < least_R1, 0.0)
    cumulative_RV = probs_RV.cumsum(dim=1)
    total_R1 = cumulative_RV[:, -1:]
    # Rounding must not move the target to the total, past the last token with nonzero probability.
    below_R1 = total_R1.nextafter(torch.zeros_like(total_R1))
    target_R1 = torch.minimum(column([uniform(row.seed, row.position) for row in rows]) * total_R1, below_R1)
    tokens_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    logprobs_R1 = (probs_RV.gather(1, tokens_R1) / total_R1).log()
    return tokens_R1[:, 0], torch.cat([logprobs_R1, total_R1.clamp(max=1.0)], dim=1)


def _top_filters(probs_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Sets the probabilities of tokens that top-k, then top-p excludes to 0; the most likely token always stays."""
    vocab = probs_RV.shape[1]
    device = probs_RV.device
    sorted_RV, order_RV = probs_RV.sort(dim=1, descending=True, stable=True)
    kept = [min(row.top_k, vocab) if row.top_k > 0 else vocab for row in rows]
    rank_V = torch.arange(vocab, device=device)
    out_RV = rank_V[None] >= torch.tensor(kept, device=device)[:, None]
    sorted_RV = sorted_RV.masked_fill(out_RV, 0.0)
    before_RV = sorted_RV.cumsum(dim=1) - sorted_RV
    top_p = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=device)[:, None]
    # Top-p is a share of what top-k kept. A row without top-p must not lose its tail to rounding of the sum.
    out_RV |= (before_RV >= top_p * sorted_RV.sum(dim=1, keepdim=True)) & (top_p < 1)
    out_RV[:, 0] = False
    return probs_RV.masked_fill(torch.zeros_like(out_RV).scatter(1, order_RV, out_RV), 0.0)
