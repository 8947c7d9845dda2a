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


def log_probabilities(logits_RV: torch.Tensor, tokens_R: torch.Tensor) -> list[float]:
    """Natural log-probability of one token per row, in float32, before temperature and filters."""
    logits_RV = logits_RV.float()
    chosen_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
    result: list[float] = (chosen_R - logits_RV.logsumexp(dim=1)).tolist()
    return result


def sample(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Token ids `[R]`."""
    tokens_R = logits_RV.argmax(dim=1)
    drawn = [index for index, row in enumerate(rows) if row.temperature > 0 and row.forced is None]
    if drawn:
        where = torch.tensor(drawn, device=logits_RV.device)
        tokens_R[where] = _draw(logits_RV[where], [rows[index] for index in drawn])
    forced = [(index, row.forced) for index, row in enumerate(rows) if row.forced is not None]
    if forced:
        where, values = torch.tensor(forced, device=logits_RV.device).T
        tokens_R[where] = values
    return tokens_R


def _draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    # float64: a cumulative sum over a large vocabulary must not lose the tail.
    scaled_RV = logits_RV.double() / column([row.temperature for row in rows])
    if any(row.top_k > 0 or row.top_p < 1 for row in rows):
        scaled_RV = _top_filters(scaled_RV, rows)
    probs_RV = scaled_RV.softmax(dim=1)
    least_R1 = column([row.min_p for row in rows]) * probs_RV.amax(dim=1, keepdim=True)
    probs_RV = probs_RV.masked_fill(probs_RV < least_R1, 0.0)
    cumulative_RV = probs_RV.cumsum(dim=1)
    total_R1 = cumulative_RV[:, -1:]
    # Rounding must not move the target to the total, past the last token with nonzero probability.
    below_R1 = total_R1.nextafter(torch.zeros_like(total_R1))
    target_R1 = torch.minimum(column([uniform(row.seed, row.position) for row in rows]) * total_R1, below_R1)
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]


def _top_filters(scaled_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Sets tokens that top-k, then top-p excludes to -inf; the most likely token always stays."""
    vocab = scaled_RV.shape[1]
    device = scaled_RV.device
    sorted_RV, order_RV = scaled_RV.sort(dim=1, descending=True, stable=True)
    kept = [min(row.top_k, vocab) if row.top_k > 0 else vocab for row in rows]
    rank_V = torch.arange(vocab, device=device)
    out_RV = rank_V[None] >= torch.tensor(kept, device=device)[:, None]
    probs_RV = sorted_RV.masked_fill(out_RV, float("-inf")).softmax(dim=1)
    before_RV = probs_RV.cumsum(dim=1) - probs_RV
    top_p = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=device)[:, None]
    # A row without top-p must not lose its tail to rounding of the cumulative sum.
    out_RV |= (before_RV >= top_p) & (top_p < 1)
    out_RV[:, 0] = False
    return scaled_RV.masked_fill(torch.zeros_like(out_RV).scatter(1, order_RV, out_RV), float("-inf"))
