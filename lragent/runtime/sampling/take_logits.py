"""From the logits of a step to sampled tokens and scores."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from lragent.errors import STOPS, RequestError
from lragent.runtime.request import Request
from lragent.runtime.sampling.sample import SamplingRow, log_probabilities, log_totals, sample
from lragent.runtime.scheduling.batch import Entry
from lragent.runtime.schemes import Scheme, spans_of_decode


def take_logits(
    entries: Sequence[Entry], logits_RV: torch.Tensor, scheme: Scheme, agents: int, max_positions: int
) -> list[Request]:
    """Samples or scores every logits row for its request; returns the requests that are done.

    A request whose logits are not usable (`log_totals`), or whose tokenizer fails, is done with an error; the others
    go on.

    Args:
        logits_RV: rows in the order of the entries' `Piece.rows`.
        agents: N + 1.
        max_positions: a turn ends when its trajectory has this many tokens.
    """
    wanted = [(entry.request, at) for entry in entries for piece in entry.pieces for at in piece.rows]
    if not wanted:
        return []
    totals_R = log_totals(logits_RV)
    usable_R = totals_R.isfinite()
    usable = usable_R.tolist()
    if not all(usable):
        logits_RV = logits_RV.masked_fill(~usable_R[:, None], 0.0)
    chosen = sample(logits_RV, [_sampling_row(request, at) for request, at in wanted])
    tokens, logprobs = chosen.tokens_R.tolist(), log_probabilities(logits_RV, chosen.tokens_R, totals_R)
    done: list[Request] = []
    for row, (request, at) in enumerate(wanted):
        if request.error is not None:
            continue
        if not usable[row]:
            request.error = RequestError(
                f"the model's logits after token {at} are NaN or infinite",
                "Some models overflow in float16: convert with dtype float32 or bfloat16. Or a weight is broken.",
            )
            done.append(request)
            continue
        request.logprobs.append(logprobs[row])
        if request.score:
            request.logits_from += 1
            if len(request.logprobs) == request.options.length:
                done.append(request)
            continue
        request.sampled_logprobs.append(chosen.logprobs[row])
        request.kept_mass.append(chosen.kept_mass[row])
        try:
            ended = _take_token(request, tokens[row], scheme, agents, max_positions)
        except STOPS:
            raise
        except BaseException as error:  # of the tokenizer
            request.error, ended = error, True
        if ended:
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
        options.temperature, options.top_k, options.top_p, options.min_p, request.seed, position + 1, forced
    )


def _take_token(request: Request, token: int, scheme: Scheme, agents: int, max_positions: int) -> bool:
    """Appends a sampled token and adds its decode spans; True if the turn ends with it."""
    state, options = request.state, request.options
    if not request.token_ids:
        request.usage.ttft = time.perf_counter() - request.submitted
    state.add_sampled(token, request.logprobs[-1], request.sampled_logprobs[-1], request.kept_mass[-1])
    request.token_ids.append(token)
    request.logits_from = len(state.tokens) - 1
    if options.forced is None and request.watch.push(token):
        request.finish_reason, request.stop_reason = "stop", request.watch.stop_reason
        return True
    if len(request.token_ids) == options.length or len(state.tokens) >= max_positions:
        return True
    request.spans = spans_of_decode(scheme, agents, request.agent or 0, len(state.tokens) - 1)
    return False
