"""What a captured graph must fulfil: it computes what the model computes, and tokens meet nowhere but in attention.

A cache can only stand for attention; a recurrence or convolution over tokens has a state of its own.
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
    """The graph with plain attention in the marker must compute what the model computes untold of positions.

    Raises:
        ModelError: it does not.
    """
    for tokens in (min(CHECK_TOKENS, loaded.max_positions), 1):
        ids, positions = example(loaded, tokens, seed=1)
        with torch.no_grad():
            expected = loaded.model(input_ids=ids, use_cache=False).logits.float()
            found = graph(ids, positions).float()
        # Both run in the model's dtype with sums in another order: allow its rounding over the spread of the logits.
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
                "Its attention does something that the attention interface does not show; it can't be converted.",
            )


def mixes_tokens(loaded: LoadedModel, moved: float) -> ModelError:
    """The error of a model in which tokens meet outside attention."""
    return ModelError(
        f"{loaded.architecture} mixes tokens outside attention (a recurrence or convolution; logits move by"
        f" {moved:.2e})",
        "Its state is not a KV cache, so it can't be shared.",
    )


def require_own_positions(graph: fx.GraphModule, loaded: LoadedModel) -> None:
    """Requires that logits of a token do not depend on the positions of the other tokens in the call.

    Raises:
        ModelError: they do.
    """
    cut = _without_attention(graph)
    ids, _ = example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    last = max(1, loaded.max_positions - 1)
    far = torch.cat([torch.zeros(1), torch.logspace(0, 1, ids.shape[1] - 1, base=last).round()]).long()[None]
    kept = max(1, ids.shape[1] // 3)
    near = far.clamp(max=int(far[0, kept - 1]))
    with torch.no_grad():
        with_far, with_near = (cut(ids, positions)[0, :kept].float() for positions in (far, near))
    moved = _moved(with_far, with_near)
    if moved > 0:
        raise ModelError(
            f"{loaded.architecture} treats a position by what other positions are in the call (logits move by"
            f" {moved:.2e})",
            "Keys that are cached can't follow; a rotary embedding with one set of frequencies can be converted.",
        )


def mixing(graph: fx.GraphModule, loaded: LoadedModel) -> float:
    """Measures how far logits of a token depend on the other tokens once attention is cut out of the graph.

    Three forwards are compared with a plain one: half of the tokens are other ones, which must not change the logits of
    the rest; tokens and positions are reversed, which must reverse the logits; half of the tokens are left out, which
    must not change the rest. The last one multiplies matrices of another shape, whose sums round differently. A deep
    model enlarges that for single tokens without bound, so the median token decides there: a dependence on the number
    of tokens moves all of them.

    Returns:
        The largest change of a logit beyond rounding; infinity if the graph fails on fewer tokens; 0 if none depends.
    """
    cut = _without_attention(graph)
    ids, positions = example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    order = torch.arange(ids.shape[1]).flip(0)
    some = order[1::2]
    others = ids.clone()
    others[:, order[::2]] = (others[:, order[::2]] + 1) % loaded.vocab_size
    with torch.no_grad():
        straight, replaced = (cut(i, positions)[0].float() for i in (ids, others))
        reversed_ = cut(ids[:, order], positions[:, order])[0].float()
        try:
            fewer = cut(ids[:, some], positions[:, some])[0].float()
        # Here only, positions exceed the number of rows: a graph that counts rows indexes past their end. The answer is
        # the worst one, so that capture has positions read from the input, or refuses the model.
        except (IndexError, RuntimeError):
            return math.inf
    rounding = min(256 * torch.finfo(loaded.dtype).eps, 0.03) * max(1.0, float(straight.abs().max()))
    by_order = float((straight[order] - reversed_).abs().max())
    by_number = float((straight[some] - fewer).abs().amax(1).median())
    return max(
        _moved(straight[some], replaced[some]), *(m for m in (by_order, by_number, 0.0) if not 0 < m <= rounding)
    )


def _without_attention(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy (tensors are shared) in which each token sees itself only."""
    cut = copy.deepcopy(graph, {id(t): t for t in (*graph.parameters(), *graph.buffers())})
    for node in marker_nodes(cut):
        with cut.graph.inserting_before(node):
            own = cut.graph.call_function(own_value, tuple(argument(node, name) for name in (QUERY, KEY, VALUE)))
        node.replace_all_uses_with(own)
        cut.graph.erase_node(node)
    cut.recompile()
    return cut


def mixing_of_model(loaded: LoadedModel, tokens: int) -> tuple[TokensAlone, float]:
    """Compares two forwards in which every token attends to itself only: another token must change no other's logits.

    Exporting a recurrence takes minutes, and may fail for reasons that hide this one.

    Returns:
        The forward, or the one of the two that failed; the largest change of another token's logit, 0 if one failed.

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
    return before, _moved(*(t[0, others].float() for t in (before.logits_1TV, after.logits_1TV)))


def _moved(before_TV: Tensor, after_TV: Tensor) -> float:
    """The largest difference of logits from two forwards with the same shapes; 0 if there is none.

    The same operations on rows of the same values round alike, in any dtype. Differences below four units in the last
    place of float32, which nothing but rounding makes, still count as none.
    """
    largest = float((before_TV - after_TV).abs().max())
    return 0.0 if largest <= 4 * torch.finfo(torch.float32).eps * max(1.0, float(before_TV.abs().max())) else largest
