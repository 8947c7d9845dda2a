"""From the logits of a step to sampled tokens and scores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from lragent.errors import RequestError
from lragent.runtime.request import Request
from lragent.runtime.sampling.sample import SamplingRow, log_probabilities, sample
from lragent.runtime.scheduling.batch import Entry
from lragent.runtime.schemes import Scheme, acting_span


def take_logits(
    entries: Sequence[Entry], logits_RV: torch.Tensor, scheme: Scheme, agents: int, max_positions: int
) -> list[Request]:
    """Samples or scores every logits row for its request; returns the requests that are done.

    A request whose logits are NaN is done with an error: a token taken from them would be meaningless.

    Args:
        logits_RV: rows in the order of the entries' `Piece.rows`.
        agents: N + 1.
        max_positions: a turn ends when its trajectory has this many tokens.
    """
    wanted = [(entry.request, at) for entry in entries for piece in entry.pieces for at in piece.rows]
    if not wanted:
        return []
    chosen = sample(logits_RV, [_sampling_row(request, at) for request, at in wanted])
    logprobs = log_probabilities(logits_RV, chosen)
    done: list[Request] = []
    for (request, at), token, logprob in zip(wanted, chosen.tolist(), logprobs, strict=True):
        if request.error is not None:
            continue
        if math.isnan(logprob):
            request.error = RequestError(
                f"the model's logits after token {at} are NaN",
                "Some models overflow in float16: convert with dtype float32 or bfloat16. Or a weight is broken.",
            )
            done.append(request)
            continue
        request.logprobs.append(logprob)
        if request.score:
            request.logits_from += 1
            if len(request.logprobs) == request.options.length:
                done.append(request)
        elif _take_token(request, token, scheme, agents, max_positions):
            done.append(request)
    return done


def _sampling_row(request: Request, position: int) -> SamplingRow:
    options = request.options
    forced: int | None = None
    if options.forced is not None:
        # All tokens of a score but the last are in its trajectory already.
        first = request.prompt - options.length if request.score else request.prompt - 1
        forced = options.forced[position - first]
    return SamplingRow(
        options.temperature, options.top_k, options.top_p, options.min_p, options.seed, position + 1, forced
    )


def _take_token(request: Request, token: int, scheme: Scheme, agents: int, max_positions: int) -> bool:
    """Appends a sampled token and adds its decode span; True if the turn ends with it."""
    state, options = request.state, request.options
    if not request.token_ids:
        request.usage.ttft = time.perf_counter() - request.submitted
    state.tokens.append(token)
    state.logprobs.append(request.logprobs[-1])
    request.token_ids.append(token)
    request.logits_from = len(state.tokens) - 1
    if options.forced is None and request.watch.push(token):
        request.finish_reason = "stop"
        return True
    if len(request.token_ids) == options.length or len(state.tokens) >= max_positions:
        return True
    at = len(state.tokens)
    span = acting_span(scheme, agents, request.agent or 0, at - 1, at, "decode")
    request.spans = [replace(span, logits_from=at - 1)]
    return False
