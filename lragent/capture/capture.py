"""Stage 2: `LoadedModel -> Captured`, one exported graph of the whole model with attention as a marker op.

The model is exported without a KV cache on packed tokens `[1, T]` with all representative adapters active. Attention
arrives through transformers' `AttentionInterface`: our function is registered there only, not in the mask registry, so
no mask nodes appear. What the graph computes is then checked (`checks.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lragent.capture import checks
from lragent.capture.context import CaptureContext
from lragent.capture.positions_from_input import POSITIONS_FROM_INPUT
from lragent.capture.recognize_attention import RECOGNIZE_ATTENTION
from lragent.errors import ModelError
from lragent.graph.attention_marker import marker_nodes
from lragent.graph.fx_tools import depends_on_ids, evaluate
from lragent.graph.passes import run_pass
from lragent.graph.plain_graph import functional, plain_graph
from lragent.graph.quiet_export import without_exporter_noise
from lragent.kernels import ops
from lragent.loading.model import LoadedModel
from lragent.probing.attention_interface import attention_as
from lragent.probing.experts import row_wise_experts
from lragent.probing.mask_limits import TokensAlone, run_tokens_alone
from lragent.probing.position_offset import logits_at
from lragent.probing.rotary_limits import steady_frequencies

# Packed tokens a step may hold; only an upper bound for the exported dimension.
MAX_PACKED_TOKENS = 1 << 20
EXAMPLE_TOKENS = 7


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
        return logits_at(self.model, input_ids, position_ids + self.offset if self.offset else position_ids)


def capture(loaded: LoadedModel) -> Captured:
    """Exports the model.

    Raises:
        ModelError: it can't be exported, its attention is not behind transformers' attention interface, the exported
            graph computes something else than the model, or tokens meet outside attention.
    """
    captured, reason = _capture_interface(loaded)
    if captured is None:
        captured = _capture_written_out(loaded, reason)
    moved = checks.mixing(captured.graph, loaded)
    if moved != 0:
        run_pass(POSITIONS_FROM_INPUT, captured.graph, CaptureContext(loaded.max_positions))
        moved = checks.mixing(captured.graph, loaded)
    checks.require_same_logits(captured.graph, loaded)
    if moved > 0:
        raise checks.mixes_tokens(loaded, moved)
    checks.require_own_positions(captured.graph, loaded)
    return captured


def _capture_interface(loaded: LoadedModel) -> tuple[Captured | None, str]:
    """The graph with attention as it passes transformers' interface; None and the reason if the model doesn't go
    through it, or does not run with another attention, or not without a mask.

    Raises:
        ModelError: what the model gives to the interface can't be shared, or it can't be exported.
    """
    outside = "computes attention outside transformers' attention interface"
    if not loaded.model._can_set_attn_implementation():
        return None, outside
    alone, moved = checks.mixing_of_model(loaded, EXAMPLE_TOKENS)
    if alone.failure:
        return None, f"does not run with another attention ({alone.failure})"
    if alone.calls and moved > 0:
        raise checks.mixes_tokens(loaded, moved)
    if moved == 0:
        _require_masks_as_told(alone, loaded)
        # The same forward with masks ran, so that the missing mask is what it fails by.
        if run_tokens_alone(loaded.model, *checks.example(loaded, EXAMPLE_TOKENS), masks=False).failure:
            return None, "works on its mask itself in its attention"
    try:
        captured = _export(loaded, partial(attention_as, loaded.model, _attention))
    except NotExported as error:
        if moved > 0:  # the reason behind the export's own
            raise checks.mixes_tokens(loaded, moved) from error
        raise
    return (captured if marker_nodes(captured.graph) else None), outside


def _capture_written_out(loaded: LoadedModel, unfit: str) -> Captured:
    """The graph of the model as it is, masks included, with attention found in it.

    Args:
        unfit: why its attention could not be taken from the interface.

    Raises:
        ModelError: no attention is found, or it is more than scale, causal mask and slopes.
    """
    # Models with tables of masks branch where the tokens fill the table.
    try:
        captured = _export(loaded, nullcontext, most_tokens=max(loaded.max_positions - 1, EXAMPLE_TOKENS))
    except NotExported as error:
        raise NotExported(f"{loaded.architecture} {unfit}, and {error.message}", error.hint) from error
    report = run_pass(RECOGNIZE_ATTENTION, captured.graph, CaptureContext(loaded.max_positions))
    if report.misses or not report.changed:
        first = next(iter(report.misses), None)
        reason = f"{first.reason} (node {first.node})" if first else "none was found in its graph"
        raise ModelError(f"{loaded.architecture} {unfit}: {reason}", RECOGNIZE_ATTENTION.hint)
    return captured


class NotExported(ModelError):
    """torch.export failed."""


def _export(
    loaded: LoadedModel, attention: Callable[[], AbstractContextManager[None]], most_tokens: int = MAX_PACKED_TOKENS
) -> Captured:
    """One graph of the model, as traced with `attention` in force."""
    ids, positions = checks.example(loaded, EXAMPLE_TOKENS)
    # Some sizes are proven equal from two tokens on, others never; one token is checked by running it.
    for fewest, unproven in ((1, False), (2, False), (2, True)):
        tokens = torch.export.Dim("T", min=fewest, max=most_tokens)
        model = loaded.model
        with (
            without_exporter_noise(),
            attention(),
            row_wise_experts(model),
            steady_frequencies(model),
            torch.no_grad(),
        ):
            try:
                program = torch.export.export(
                    _LogitsOnly(model, loaded.position_offset),
                    (ids, positions),
                    dynamic_shapes={"input_ids": {1: tokens}, "position_ids": {1: tokens}},
                    strict=False,
                    # What the exporter can't prove of T is asserted in the graph, and left to the next export.
                    prefer_deferred_runtime_asserts_over_guards=unproven,
                )
                break
            except ModelError:
                raise
            except Exception as error:
                if not unproven and "Constraints violated" in str(error):
                    continue
                raise NotExported(
                    f"torch.export can't capture {loaded.architecture}: {_export_failure(error)}",
                    "This architecture needs support in capture; please report it with the model's config.json.",
                ) from error
    with without_exporter_noise():
        graph = plain_graph(functional(program))
    if unproven:
        _require_assertions(graph, loaded, most_tokens)
    return Captured(graph=graph, loaded=loaded)


def _require_assertions(graph: fx.GraphModule, loaded: LoadedModel, most_tokens: int) -> None:
    """What the exporter asserted of the number of tokens, because it could not prove it, must hold for any number.

    Raises:
        NotExported: it does not.
    """
    on_ids = depends_on_ids(graph.graph)
    powers = [(1 << bits) + more for bits in range(6, most_tokens.bit_length()) for more in (-1, 0, 1)]
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        condition, text = node.args[0], str(node.args[1])
        for tokens in (*range(1, 65), *(n for n in powers if n <= most_tokens)):
            known = isinstance(condition, fx.Node) and condition not in on_ids
            if not (known and evaluate(graph, condition, tokens, {})):
                raise NotExported(
                    f"torch.export can't capture {loaded.architecture}: its code depends on the number of tokens"
                    f" ({_short(text.removeprefix('Runtime assertion failed for expression ').split(' on node')[0])})",
                    "This architecture needs support in capture; please report it with the model's config.json.",
                )


def _require_masks_as_told(alone: TokensAlone, loaded: LoadedModel) -> None:
    """Each attention call must be under a mask of transformers that is causal with the window that it passes.

    Raises:
        ModelError: one is not.
    """
    for call in alone.calls:
        if call.own_mask:
            raise _own_mask(f"attention of {call.caller}")
        if not call.mask_is_as_declared(loaded.max_positions):
            told = f"a sliding window of {call.window}" if call.window else "no sliding window"
            raise ModelError(
                f"attention of {call.caller} is under a mask that is not causal with {told}, as it says",
                "Only causal and sliding-window masks are shared.",
            )


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
        raise _own_mask(where)
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _IGNORED)
    if any(isinstance(others[name], Tensor) for name in unknown):
        raise ModelError(f"{where} passes {', '.join(unknown)}", "This attention input is not supported.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(getattr(module, "layer_idx", -1))
    out = ops.attention_marker(
        query, key, value, s_aux, layer, float(scale), int(sliding_window or 0), float(softcap or 0.0)
    )
    return out, None


def _own_mask(where: str) -> ModelError:
    return ModelError(f"{where} adds a mask or bias of its own", "Only causal and sliding-window masks are shared.")


def _export_failure(error: Exception) -> str:
    """What the model's code does that can't be exported, in one line."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    code = re.search(r"The following call raised this error:\n.*\n *(.+)", text)
    if "data-dependent" in first:
        return "its code branches on the values of tensors" + (f" ({code[1].strip()})" if code else "")
    guard = re.search(r"satisfy the generated guard (.+?)(?:Specializations|$)", text)
    if "Constraints violated" in first:
        return "its code depends on the number of tokens T" + (f" ({_short(guard[1])})" if guard else "")
    return f"{type(error).__name__}: {first}"


def _short(guard: str) -> str:
    plain = guard.replace("L['input_ids'].size()[1]", "T").rstrip(".")
    return plain if len(plain) <= 80 else plain[:77] + "..."
