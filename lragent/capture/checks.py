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
    """What is computed of a token's position must not depend on the positions of others in the call.

    Raises:
        ModelError: it does.
    """
    cut = _without_attention(graph)
    ids, _ = example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    last = max(1, loaded.max_positions - 1)
    positions = torch.cat([torch.zeros(1), torch.logspace(0, 1, ids.shape[1] - 1, base=last).round()]).long()[None]
    near = max(1, ids.shape[1] // 3)
    with torch.no_grad():
        whole, few = cut(ids, positions).float(), cut(ids[:, :near], positions[:, :near]).float()
    moved = _beyond_rounding(whole[:, :near] - few, whole, loaded)
    if moved > 0:
        raise ModelError(
            f"{loaded.architecture} treats a position by what other positions are in the call (logits move by"
            f" {moved:.2e})",
            "Keys that are cached can't follow; a rotary embedding with one set of frequencies can be converted.",
        )


def mixing(graph: fx.GraphModule, loaded: LoadedModel) -> float:
    """With attention cut out of the graph, swapping tokens (and positions) must swap their logits, and leaving some out
    must leave the others' as they are: by how much the logits move, 0 if that is rounding."""
    cut = _without_attention(graph)
    ids, positions = example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    order = torch.arange(ids.shape[1]).flip(0)
    some = order[1::2]
    with torch.no_grad():
        straight = cut(ids, positions).float()
        flipped = cut(ids[:, order], positions[:, order]).float()
        try:
            fewer = cut(ids[:, some], positions[:, some]).float()
        # Here only, positions exceed the number of rows: a graph that counts rows indexes past their end. The answer is
        # the worst one, so that capture has positions read from the input, or refuses the model.
        except (IndexError, RuntimeError):
            return math.inf
    return _beyond_rounding(torch.cat([straight[:, order] - flipped, straight[:, some] - fewer], 1), straight, loaded)


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
        The forward, or the one of the two that failed, and by how much others' logits move; 0 if that is rounding, or
        if one failed.

    Raises:
        ModelError: an attention call does not have one key per token.
    """
    ids, positions = example(loaded, tokens)
    others = torch.arange(tokens) != 1
    changed = torch.where(others, ids, (ids + 1) % loaded.vocab_size)
    before, after = (run_tokens_alone(loaded.model, i, positions) for i in (ids, changed))
    if before.logits_1TV is None or after.logits_1TV is None:
        return (before if before.failure else after), 0.0
    logits, moved = (t[0, others].float() for t in (before.logits_1TV, after.logits_1TV))
    return before, _beyond_rounding(logits - moved, logits, loaded)


def _beyond_rounding(difference: Tensor, logits: Tensor, loaded: LoadedModel) -> float:
    """The largest difference of logits, 0 if it is the rounding of the model's dtype."""
    allowed = 256 * torch.finfo(loaded.dtype).eps * max(1.0, float(logits.abs().max()))
    largest = float(difference.abs().max())
    return 0.0 if largest <= allowed else largest
