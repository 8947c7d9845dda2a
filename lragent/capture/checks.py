"""Checks of a captured graph: it equals the model, and tokens are mixed in attention only.

A KV cache replaces the state of attention only. A recurrence or convolution over tokens has another state.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, fx

from lragent.errors import ModelError
from lragent.graph.attention_marker import KEY, QUERY, VALUE, marker_nodes
from lragent.graph.fx_tools import argument
from lragent.loading.model import LoadedModel
from lragent.probing.attention_interface import own_value
from lragent.probing.experts import row_wise_experts
from lragent.probing.mask_limits import TokensAlone, run_tokens_alone

CHECK_TOKENS = 24


def example(loaded: LoadedModel, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random token ids and their positions, `[1, T]` each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, loaded.vocab_size, (1, tokens), generator=generator)
    return ids, torch.arange(tokens)[None] % loaded.max_positions


def require_same_logits(graph: fx.GraphModule, loaded: LoadedModel) -> None:
    """Checks that the graph, with plain attention in the markers, equals the model called without position ids.

    Raises:
        ModelError: logits differ by more than rounding.
    """
    for tokens in (min(CHECK_TOKENS, loaded.max_positions), 1):
        ids, positions = example(loaded, tokens, seed=1)
        with torch.no_grad():
            expected = loaded.model(input_ids=ids, use_cache=False).logits.float()
            found = graph(ids, positions).float()
        # Both run in the model's dtype but sum in a different order: allow rounding relative to the largest logit.
        allowed = 64 * torch.finfo(loaded.dtype).eps * float(expected.abs().max())
        difference = float((expected - found).abs().max())
        if not difference <= max(allowed, 1e-6) * max(1, len(marker_nodes(graph))):
            both_ways = [m for m in loaded.model.modules() if getattr(m, "is_causal", True) is False]
            if both_ways:
                raise ModelError(
                    f"attention of {type(both_ways[0]).__name__} is not causal",
                    "Only decoder-only models can be converted.",
                )
            raise ModelError(
                f"the captured graph of {loaded.architecture} differs from the model by {difference:.2e} in its logits",
                "Its attention computes something outside the attention interface, so it can't be converted.",
            )


def tokens_are_mixed(loaded: LoadedModel, mixing: float) -> ModelError:
    """The error for a model that mixes tokens outside attention; `mixing` is its token mixing error."""
    return ModelError(
        f"{loaded.architecture} mixes tokens outside attention (a recurrence or convolution; logits move by"
        f" {mixing:.2e})",
        "Its state is not a KV cache, so it can't be shared.",
    )


def require_independent_positions(graph: fx.GraphModule, loaded: LoadedModel) -> None:
    """Checks that logits of a token do not depend on the positions of other tokens in the call.

    Raises:
        ModelError: they depend on them.
    """
    no_mixing = _without_attention(graph)
    ids, _ = example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    last = max(1, loaded.max_positions - 1)
    far = torch.cat([torch.zeros(1), torch.logspace(0, 1, ids.shape[1] - 1, base=last).round()]).long()[None]
    kept = max(1, ids.shape[1] // 3)
    near = far.clamp(max=int(far[0, kept - 1]))
    with torch.no_grad():
        with_far, with_near = (no_mixing(ids, positions)[0, :kept].float() for positions in (far, near))
    change = _logit_change(with_far, with_near)
    if change > 0:
        raise ModelError(
            f"{loaded.architecture} treats a position by what other positions are in the call (logits move by"
            f" {change:.2e})",
            "Cached keys can't be updated later; a rotary embedding with one set of frequencies can be converted.",
        )


def token_mixing_error(graph: fx.GraphModule, loaded: LoadedModel) -> float:
    """Largest change of a token's logits due to other tokens, in a copy of the graph where tokens attend to themselves.

    A plain forward is compared with three others:
    - Half of the tokens are replaced: the logits of the rest must not change.
    - Tokens and positions are reversed: the logits must be reversed.
    - Half of the tokens are dropped: the logits of the rest must not change. Its matrices have other shapes, so sums
      round differently, and a deep model amplifies that for single tokens without bound. A dependence on the number
      of tokens changes all tokens, so the median token is compared.

    Returns:
        The largest change beyond rounding; 0 if there is none; infinity if the graph fails on fewer tokens.
    """
    no_mixing = _without_attention(graph)
    ids, positions = example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    order = torch.arange(ids.shape[1]).flip(0)
    some = order[1::2]
    others = ids.clone()
    others[:, order[::2]] = (others[:, order[::2]] + 1) % loaded.vocab_size
    with torch.no_grad():
        straight, replaced = (no_mixing(i, positions)[0].float() for i in (ids, others))
        reversed_ = no_mixing(ids[:, order], positions[:, order])[0].float()
        try:
            fewer = no_mixing(ids[:, some], positions[:, some])[0].float()
        # Only here, positions exceed the number of rows. A graph that computes positions as arange(T) then indexes past
        # the end. Infinity makes capture run `positions_from_input`, or refuse the model.
        except (IndexError, RuntimeError):
            return math.inf
    rounding = min(256 * torch.finfo(loaded.dtype).eps, 0.03) * max(1.0, float(straight.abs().max()))
    by_order = float((straight[order] - reversed_).abs().max())
    by_number = float((straight[some] - fewer).abs().amax(1).median())
    beyond = [change for change in (by_order, by_number) if not change <= rounding]
    return max([_logit_change(straight[some], replaced[some]), *beyond])


def _without_attention(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which each token attends to itself only; tensors are shared."""
    cut = copy.deepcopy(graph, {id(t): t for t in (*graph.parameters(), *graph.buffers())})
    for node in marker_nodes(cut):
        with cut.graph.inserting_before(node):
            own = cut.graph.call_function(own_value, tuple(argument(node, name) for name in (QUERY, KEY, VALUE)))
        node.replace_all_uses_with(own)
        cut.graph.erase_node(node)
    cut.recompile()
    return cut


def token_mixing_error_of_model(loaded: LoadedModel, tokens: int) -> tuple[TokensAlone, float]:
    """Replaces one token in a forward of the model where tokens attend to themselves, and compares the other logits.

    Runs before the export: exporting a recurrence takes minutes and may fail with an unrelated error.

    Returns:
        The forward (the failed one, if one of the two failed), and the largest change of other tokens' logits (0 if one
        failed).

    Raises:
        ModelError: an attention call does not have one key per token.
    """
    ids, positions = example(loaded, tokens)
    others = torch.arange(tokens) != 1
    changed = torch.where(others, ids, (ids + 1) % loaded.vocab_size)
    with row_wise_experts(loaded.model):
        before, after = (run_tokens_alone(loaded.model, i, positions) for i in (ids, changed))
    if before.logits_1TV is None or after.logits_1TV is None:
        return (before if before.failure else after), 0.0
    return before, _logit_change(*(t[0, others].float() for t in (before.logits_1TV, after.logits_1TV)))


def _logit_change(before_TV: Tensor, after_TV: Tensor) -> float:
    """The largest difference of logits of two forwards with the same shapes; 0 if it is rounding.

    The same operations on equal rows round equally, in any dtype. Differences below four units in the last place of
    float32 count as rounding nevertheless.
    """
    largest = float((before_TV - after_TV).abs().max())
    return 0.0 if largest <= 4 * torch.finfo(torch.float32).eps * max(1.0, float(before_TV.abs().max())) else largest
