"""Stage 2: `LoadedModel -> Captured`, one exported graph of the whole model with attention as a marker op.

The model is exported without a KV cache on packed tokens `[1, T]` with all representative adapters active. Attention
arrives through transformers' `AttentionInterface`: our function is registered there only, not in the mask registry, so
no mask nodes appear. What the graph computes is then compared with the model itself, and checked to mix tokens nowhere
but in attention: a cache can only stand for attention.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lragent.errors import ModelError
from lragent.exporter_noise import without_exporter_noise
from lragent.kernels import ops
from lragent.kernels.markers import marker_nodes
from lragent.loading import LoadedModel
from lragent.plain_graph import plain_graph

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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits


def capture(loaded: LoadedModel) -> Captured:
    """Exports the model.

    Raises:
        ModelError: it can't be exported, its attention is not behind transformers' attention interface, the exported
            graph computes something else than the model, or tokens meet outside attention.
    """
    ids, positions = _example(loaded, EXAMPLE_TOKENS)
    tokens = torch.export.Dim("T", min=1, max=MAX_PACKED_TOKENS)
    with without_exporter_noise(), _marker_attention(loaded.model), _exportable_experts(loaded.model), torch.no_grad():
        try:
            program = torch.export.export(
                _LogitsOnly(loaded.model),
                (ids, positions),
                dynamic_shapes={"input_ids": {1: tokens}, "position_ids": {1: tokens}},
                strict=False,
            )
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"torch.export can't capture {loaded.architecture}: {_first_line(error)}",
                "This architecture needs support in capture; please report it with the model's config.json.",
            ) from error
    with without_exporter_noise():
        captured = Captured(graph=plain_graph(program), loaded=loaded)
    _require_markers(captured)
    _require_same_logits(captured)
    _require_token_wise(captured)
    return captured


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
    if getattr(module, "is_causal", True) is False or others.get("is_causal") is False:
        raise ModelError(f"{where} is not causal", "Only decoder-only models can be converted.")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _IGNORED)
    if any(isinstance(others[name], Tensor) for name in unknown):
        raise ModelError(f"{where} passes {', '.join(unknown)}", "This attention input is not supported.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(getattr(module, "layer_idx", -1))
    out = ops.attention_marker(
        query, key, value, s_aux, layer, float(scale), int(sliding_window or 0), float(softcap or 0.0)
    )
    return out, None


def _require_markers(captured: Captured) -> None:
    if not marker_nodes(captured.graph):
        raise ModelError(
            f"{captured.loaded.architecture} computes attention outside transformers' attention interface",
            "Such a model can't be converted yet.",
        )


def _example(loaded: LoadedModel, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, loaded.vocab_size, (1, tokens), generator=generator)
    return ids, torch.arange(tokens)[None] % loaded.max_positions


def _require_same_logits(captured: Captured) -> None:
    """The graph with plain attention in the marker must compute what the model computes."""
    loaded = captured.loaded
    ids, positions = _example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=1)
    with torch.no_grad():
        expected = loaded.model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        found = captured.graph(ids, positions).float()
    # Both run in the model's dtype with sums in another order: allow its rounding over the spread of the logits.
    allowed = 64 * torch.finfo(loaded.dtype).eps * float(expected.abs().max())
    difference = float((expected - found).abs().max())
    if not difference <= max(allowed, 1e-6) * max(1, len(marker_nodes(captured.graph))):
        raise ModelError(
            f"the captured graph of {loaded.architecture} differs from the model by {difference:.2e} in its logits",
            "Its attention does something that the attention interface does not show; it can't be converted.",
        )


def _require_token_wise(captured: Captured) -> None:
    """With attention cut out, swapping two tokens (and positions) must swap their logits and change nothing else."""
    loaded = captured.loaded
    cut = copy.deepcopy(captured.graph, {id(t): t for t in _tensors(captured.graph)})
    for node in marker_nodes(cut):
        query, value = node.args[0], node.args[2]
        with cut.graph.inserting_before(node):
            own = cut.graph.call_function(_own_value, (query, value))
        node.replace_all_uses_with(own)
        cut.graph.erase_node(node)
    cut.recompile()
    ids, positions = _example(loaded, min(CHECK_TOKENS, loaded.max_positions), seed=2)
    order = torch.arange(ids.shape[1]).flip(0)
    with torch.no_grad():
        straight = cut(ids, positions).float()
        flipped = cut(ids[:, order], positions[:, order]).float()
    allowed = 256 * torch.finfo(loaded.dtype).eps * max(1.0, float(straight.abs().max()))
    difference = float((straight[:, order] - flipped).abs().max())
    if not difference <= allowed:
        raise ModelError(
            f"{loaded.architecture} mixes tokens outside attention (a recurrence or convolution; logits move by"
            f" {difference:.2e})",
            "Its state is not a KV cache, so it can't be shared.",
        )


def _own_value(query_1HqTD: Tensor, value_1HTD: Tensor) -> Tensor:
    """Stands for attention where each token sees itself only."""
    groups = query_1HqTD.shape[1] // value_1HTD.shape[1]
    return value_1HTD.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
