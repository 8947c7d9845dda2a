"""Stage 2: `LoadedModel -> Captured`, one exported graph of the whole model with attention as a marker op.

The model is exported without a KV cache on packed tokens `[1, T]` with all representative adapters active. Attention
arrives through transformers' `AttentionInterface`: our function is registered there only, not in the mask registry, so
no mask nodes appear. What the graph computes is then compared with the model itself, and checked to mix tokens nowhere
but in attention: a cache can only stand for attention.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lragent.errors import ModelError
from lragent.exporter_noise import without_exporter_noise
from lragent.kernels import ops
from lragent.kernels.markers import marker_nodes
from lragent.loading import LoadedModel
from lragent.plain_attention import mark_plain_attention
from lragent.plain_graph import functional, plain_graph
from lragent.positions import ask_for_positions

log = logging.getLogger(__name__)

ATTENTION_NAME = "lragent_marker"
# Packed tokens a step may hold; only an upper bound for the exported dimension.
MAX_PACKED_TOKENS = 1 << 20
EXAMPLE_TOKENS = 7
CHECK_TOKENS = 24


@dataclass(frozen=True)
class Captured:
    """The exported model: placeholders `input_ids`, `position_ids` (`[1, T]`), output logits `[1, T, vocab]`.

    `graph` is unlifted: parameters are `get_attr` nodes whose targets are fully qualified names.
    """

    graph: fx.GraphModule
    loaded: LoadedModel


class _LogitsOnly(nn.Module):
    """The call that is exported."""

    def __init__(self, model: nn.Module, offset: int) -> None:
        super().__init__()
        self.model = model
        self.offset = offset

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        positions = position_ids + self.offset if self.offset else position_ids
        logits: Tensor = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        return logits


def capture(loaded: LoadedModel) -> Captured:
    """Exports the model.

    Raises:
        ModelError: it can't be exported, its attention is not behind transformers' attention interface, the exported
            graph computes something else than the model, or tokens meet outside attention.
    """
    captured, reason = _capture_interface(loaded)
    if captured is None:
        captured = _capture_written_out(loaded, reason)
    if not _is_token_wise(captured):
        ask_for_positions(captured.graph)
    _require_same_logits(captured)
    _require_token_wise(captured)
    return captured


def _capture_interface(loaded: LoadedModel) -> tuple[Captured | None, str]:
    """The graph with attention as it passes transformers' interface; None and the reason if the model doesn't go
    through it, or not without a mask.

    Raises:
        ModelError: what the model gives to the interface can't be shared.
    """
    if not loaded.model._can_set_attn_implementation():
        return None, ""
    attention_calls, difference = _mixing_without_attention(loaded)
    if attention_calls and difference > 0:
        raise _mixing(loaded, difference)
    try:
        captured = _export(loaded, partial(_marker_attention, loaded.model))
    except NotExported as error:
        if difference > 0:  # the reason behind the export's own
            raise _mixing(loaded, difference) from error
        if isinstance(error.__cause__, (TypeError, AttributeError)):
            return None, "works on its mask itself"
        raise
    return (captured if marker_nodes(captured.graph) else None), ""


def _capture_written_out(loaded: LoadedModel, unfit: str) -> Captured:
    """The graph of the model as it is, masks included, with attention found in it.

    Args:
        unfit: why its attention could not be taken from the interface ("": it is not there).

    Raises:
        ModelError: no attention is found, or it is more than scale, causal mask and slopes.
    """
    # Models with tables of masks branch where the tokens fill the table.
    where = f"{unfit} in its attention" if unfit else "computes attention outside transformers' attention interface"
    try:
        captured = _export(loaded, nullcontext, most_tokens=max(loaded.max_positions - 1, EXAMPLE_TOKENS))
    except NotExported as error:
        raise NotExported(f"{loaded.architecture} {where}, and {error.message}", error.hint) from error
    found, reason = mark_plain_attention(captured.graph, loaded.max_positions)
    if not found or reason:
        raise ModelError(
            f"{loaded.architecture} {where}: {reason or 'none was found in its graph'}",
            "Such a model can't be converted yet.",
        )
    return captured


class NotExported(ModelError):
    """torch.export failed."""


def _export(
    loaded: LoadedModel, attention: Callable[[], AbstractContextManager[None]], most_tokens: int = MAX_PACKED_TOKENS
) -> Captured:
    """One graph of the model, as traced with `attention` in force."""
    ids, positions = _example(loaded, EXAMPLE_TOKENS)
    for fewest in (1, 2):
        tokens = torch.export.Dim("T", min=fewest, max=most_tokens)
        with without_exporter_noise(), attention(), _exportable_experts(loaded.model), torch.no_grad():
            try:
                program = torch.export.export(
                    _LogitsOnly(loaded.model, loaded.position_offset),
                    (ids, positions),
                    dynamic_shapes={"input_ids": {1: tokens}, "position_ids": {1: tokens}},
                    strict=False,
                )
                break
            except ModelError:
                raise
            except Exception as error:
                if fewest == 1 and "Constraints violated" in str(error):
                    continue  # some sizes are proven equal from two tokens on; one token is checked by running it
                raise NotExported(
                    f"torch.export can't capture {loaded.architecture}: {_export_failure(error)}",
                    "This architecture needs support in capture; please report it with the model's config.json.",
                ) from error
    with without_exporter_noise():
        return Captured(graph=plain_graph(functional(program)), loaded=loaded)


@contextmanager
def _marker_attention(model: Any) -> Iterator[None]:
    """Sends the model's attention calls to the marker op while it is exported."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)


@contextmanager
def _exportable_experts(model: Any) -> Iterator[None]:
    """Mixture-of-experts layers loop over the experts that were hit, which can't be exported; gather them instead."""
    config = model.config.get_text_config()
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = before


def _mixing_without_attention(loaded: LoadedModel) -> tuple[int, float]:
    """With every token seeing itself only, another token must change no other token's logits. Exporting a recurrence
    takes minutes, and may fail for reasons that hide this one.

    Returns:
        How often attention was called, and by how much others' logits move; 0 if that is rounding.
    """
    from transformers.modeling_utils import AttentionInterface

    calls: list[nn.Module] = []

    def own(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        calls.append(module)
        return _own_value(query, key, value), None

    ids, positions = _example(loaded, EXAMPLE_TOKENS)
    others = torch.arange(EXAMPLE_TOKENS) != 1
    changed = torch.where(others, ids, (ids + 1) % loaded.vocab_size)
    with _marker_attention(loaded.model), torch.no_grad():
        AttentionInterface.register(ATTENTION_NAME, own)
        try:
            before, after = (
                loaded.model(input_ids=i, position_ids=positions, use_cache=False).logits[0, others].float()
                for i in (ids, changed)
            )
        except Exception as error:  # it wants more of attention: the export will say what
            log.debug("no check for a recurrence: %s", error)
            return len(calls), 0.0
    difference = float((before - after).abs().max())
    allowed = 256 * torch.finfo(loaded.dtype).eps * max(1.0, float(before.abs().max()))
    return len(calls), difference if difference > allowed else 0.0


# Keyword arguments of the attention interface that don't change what causal attention over packed tokens computes.
_IGNORED = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
                      "return_dict", "output_router_logits", "is_causal", "dropout", "deterministic",
                      "num_items_in_batch", "position_embeddings", "logits_to_keep"})  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of attention: records the call as one node."""
    where = f"attention of {type(module).__name__}"
    if attention_mask is not None:
        raise ModelError(f"{where} adds a mask or bias of its own", "Only causal and sliding-window masks are shared.")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _IGNORED)
    if any(isinstance(others[name], Tensor) for name in unknown):
        raise ModelError(f"{where} passes {', '.join(unknown)}", "This attention input is not supported.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(getattr(module, "layer_idx", -1))
    out = ops.attention_marker(
        query, key, value, s_aux, layer, float(scale), int(sliding_window or 0), float(softcap or 0.0)
    )
    return out, None


def _example(loaded: LoadedModel, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, loaded.vocab_size, (1, tokens), generator=generator)
    return ids, torch.arange(tokens)[None] % loaded.max_positions


def _require_same_logits(captured: Captured) -> None:
    """The graph with plain attention in the marker must compute what the model computes untold of positions."""
    loaded = captured.loaded
    for tokens in (min(CHECK_TOKENS, loaded.max_positions), 1):
        ids, positions = _example(loaded, tokens, seed=1)
        with torch.no_grad():
            expected = loaded.model(input_ids=ids, use_cache=False).logits.float()
            found = captured.graph(ids, positions).float()
        # Both run in the model's dtype with sums in another order: allow its rounding over the spread of the logits.
        allowed = 64 * torch.finfo(loaded.dtype).eps * float(expected.abs().max())
        difference = float((expected - found).abs().max())
        if not difference <= max(allowed, 1e-6) * max(1, len(marker_nodes(captured.graph))):
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


def _require_token_wise(captured: Captured) -> None:
    difference = _graph_mixing(captured)
    if difference > 0:
        raise _mixing(captured.loaded, difference)


def _mixing(loaded: LoadedModel, difference: float) -> ModelError:
    return ModelError(
        f"{loaded.architecture} mixes tokens outside attention (a recurrence or convolution; logits move by"
        f" {difference:.2e})",
        "Its state is not a KV cache, so it can't be shared.",
    )


def _is_token_wise(captured: Captured) -> bool:
    return _graph_mixing(captured) == 0


def _graph_mixing(captured: Captured) -> float:
    """`_token_mixing` of the graph with attention cut out."""
    cut = copy.deepcopy(captured.graph, {id(t): t for t in _tensors(captured.graph)})
    for node in marker_nodes(cut):
        with cut.graph.inserting_before(node):
            own = cut.graph.call_function(_own_value, node.args[:3])
        node.replace_all_uses_with(own)
        cut.graph.erase_node(node)
    cut.recompile()
    return _token_mixing(captured.loaded, cut)


def _token_mixing(loaded: LoadedModel, run: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Swapping tokens (and positions) must swap their logits, and leaving some out must leave the others' as they are:
    by how much the logits move, 0 if that is rounding."""
    ids, positions = _example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    order = torch.arange(ids.shape[1]).flip(0)
    some = order[1::2]
    try:
        with torch.no_grad():
            straight = run(ids, positions).float()
            flipped = run(ids[:, order], positions[:, order]).float()
            fewer = run(ids[:, some], positions[:, some]).float()
    except (IndexError, RuntimeError):  # it takes positions for rows
        return math.inf
    allowed = 256 * torch.finfo(loaded.dtype).eps * max(1.0, float(straight.abs().max()))
    moved = torch.cat([straight[:, order] - flipped, straight[:, some] - fewer], 1)
    difference = float(moved.abs().max())
    return 0.0 if difference <= allowed else difference


def _own_value(query_1HqTD: Tensor, key_1HTD: Tensor, value_1HTDv: Tensor) -> Tensor:
    """Stands for attention where each token sees itself only; what it gives still depends on all of query and key."""
    groups = query_1HqTD.shape[1] // value_1HTDv.shape[1]
    query_1HqT1, key_1HT1 = (
        torch.tanh((x @ torch.cos(torch.arange(x.shape[-1]) + 1.0).to(x.dtype))[..., None])
        for x in (query_1HqTD, key_1HTD)
    )
    key_1HqT1, value_1HqTDv = (x.repeat_interleave(groups, dim=1) for x in (key_1HT1, value_1HTDv))
    return (value_1HqTDv * (1 + query_1HqT1 / 4 + key_1HqT1 / 4)).transpose(1, 2).contiguous()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _export_failure(error: Exception) -> str:
    """What the model's code does that can't be exported, in one line."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    code = re.search(r"The following call raised this error:\n.*\n *(.+)", text)
    if "data-dependent" in first:
        return "its code branches on the values of tensors" + (f" ({code[1].strip()})" if code else "")
    guard = re.search(r"satisfy the generated guard (.+)", text)
    if "Constraints violated" in first:
        return "its code depends on the number of tokens T" + (f" ({_short(guard[1])})" if guard else "")
    return f"{type(error).__name__}: {first}"


def _short(guard: str) -> str:
    plain = guard.replace("L['input_ids'].size()[1]", "T").rstrip(".")
    return plain if len(plain) <= 80 else plain[:77] + "..."
