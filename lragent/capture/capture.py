"""`LoadedModel -> Captured`: exports the whole model as one graph with attention as a marker op.

The model is exported without a KV cache on packed tokens `[1, T]`, with a representative adapter active on each adapted
module. Attention calls reach us through transformers' `AttentionInterface`. Our function is not in the mask registry,
so the graph has no mask nodes. `checks.py` then compares the graph with the model.
"""

from __future__ import annotations

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
from lragent.compat.torch import (
    asserted_condition,
    branches_on_values,
    branching_line,
    is_constraint_violation,
    violated_guard,
)
from lragent.compat.transformers import attention_can_be_set
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

# Upper bound of the exported dimension T: packed tokens per step.
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
    """The module that is exported: logits of token ids at positions."""

    def __init__(self, model: nn.Module, offset: int) -> None:
        super().__init__()
        self.model = model
        self.offset = offset

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return logits_at(self.model, input_ids, position_ids + self.offset if self.offset else position_ids)


def capture(loaded: LoadedModel) -> Captured:
    """Exports the model.

    Raises:
        ModelError: the model can't be exported, its attention is not recognized, the graph computes something else than
            the model, or tokens are mixed outside attention.
    """
    captured, reason = _capture_interface(loaded)
    if captured is None:
        captured = _capture_written_out(loaded, reason)
    mixing = checks.token_mixing_error(captured.graph, loaded)
    if mixing != 0:
        run_pass(POSITIONS_FROM_INPUT, captured.graph, CaptureContext(loaded.max_positions))
        mixing = checks.token_mixing_error(captured.graph, loaded)
    checks.require_same_logits(captured.graph, loaded)
    if mixing > 0:
        raise checks.tokens_are_mixed(loaded, mixing)
    checks.require_independent_positions(captured.graph, loaded)
    return captured


def _capture_interface(loaded: LoadedModel) -> tuple[Captured | None, str]:
    """Exports the model with the marker op behind transformers' attention interface.

    Returns:
        The graph, or None if the interface can't be used, and the reason in that case: the model does not use the
        interface, or does not run with another attention or without a mask.

    Raises:
        ModelError: the attention calls can't be shared, or the model can't be exported.
    """
    outside = "computes attention outside transformers' attention interface"
    if not attention_can_be_set(loaded.model):
        return None, outside
    alone, mixing = checks.token_mixing_error_of_model(loaded, EXAMPLE_TOKENS)
    if alone.failure:
        return None, f"does not run with another attention ({alone.failure})"
    if alone.calls and mixing > 0:
        raise checks.tokens_are_mixed(loaded, mixing)
    if mixing == 0:
        _require_declared_masks(alone, loaded)
        # The same forward ran with masks, so a failure here is due to the missing mask.
        if run_tokens_alone(loaded.model, *checks.example(loaded, EXAMPLE_TOKENS), masks=False).failure:
            return None, "works on its mask itself in its attention"
    try:
        captured = _export(loaded, partial(attention_as, loaded.model, _attention))
    except NotExported as error:
        if mixing > 0:  # the cause of the failed export
            raise checks.tokens_are_mixed(loaded, mixing) from error
        raise
    return (captured if marker_nodes(captured.graph) else None), outside


def _capture_written_out(loaded: LoadedModel, interface_error: str) -> Captured:
    """Exports the unchanged model, masks included, and replaces attention that it writes out by the marker op.

    Args:
        interface_error: the reason why the attention interface was not used.

    Raises:
        ModelError: no attention is found, or it has more than a scale, a causal mask and ALiBi slopes.
    """
    # A model with a stored mask branches when T reaches the size of the mask.
    try:
        captured = _export(loaded, nullcontext, most_tokens=max(loaded.max_positions - 1, EXAMPLE_TOKENS))
    except NotExported as error:
        raise NotExported(f"{loaded.architecture} {interface_error}, and {error.message}", error.hint) from error
    report = run_pass(RECOGNIZE_ATTENTION, captured.graph, CaptureContext(loaded.max_positions))
    if report.misses or not report.changed:
        first = next(iter(report.misses), None)
        reason = f"{first.reason} (node {first.node})" if first else "none was found in its graph"
        raise ModelError(f"{loaded.architecture} {interface_error}: {reason}", RECOGNIZE_ATTENTION.hint)
    return captured


class NotExported(ModelError):
    """torch.export failed."""


def _export(
    loaded: LoadedModel, attention: Callable[[], AbstractContextManager[None]], most_tokens: int = MAX_PACKED_TOKENS
) -> Captured:
    """Exports the model inside the context `attention()`, with 1 to `most_tokens` tokens.

    Raises:
        NotExported: torch.export fails, or the code depends on the number of tokens.
        ModelError: an attention call is not supported.
    """
    ids, positions = checks.example(loaded, EXAMPLE_TOKENS)
    # torch.export proves some equalities of sizes only for T >= 2, and others never. T = 1 is checked by running it.
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
                    # On the last attempt, unproven conditions on T become asserts in the graph (`_require_assertions`).
                    prefer_deferred_runtime_asserts_over_guards=unproven,
                )
                break
            except ModelError:
                raise
            except Exception as error:
                if not unproven and is_constraint_violation(error):
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
    """Evaluates the exporter's unproven asserts on T for many T: all small ones, and those around powers of two.

    Raises:
        NotExported: an assert fails.
    """
    id_dependent = depends_on_ids(graph.graph)
    powers = [(1 << bits) + more for bits in range(6, most_tokens.bit_length()) for more in (-1, 0, 1)]
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        condition, text = node.args[0], str(node.args[1])
        for tokens in (*range(1, 65), *(n for n in powers if n <= most_tokens)):
            known = isinstance(condition, fx.Node) and condition not in id_dependent
            if not (known and evaluate(graph, condition, tokens, {})):
                raise NotExported(
                    f"torch.export can't capture {loaded.architecture}: its code depends on the number of tokens"
                    f" ({_short(asserted_condition(text))})",
                    "This architecture needs support in capture; please report it with the model's config.json.",
                )


def _require_declared_masks(alone: TokensAlone, loaded: LoadedModel) -> None:
    """Checks that the mask of each attention call is causal with the window that the call declares.

    Raises:
        ModelError: a mask differs.
    """
    for call in alone.calls:
        if call.own_mask:
            raise _own_mask(f"attention of {call.caller}")
        if not call.mask_is_as_declared(loaded.max_positions):
            declared = f"a sliding window of {call.window}" if call.window else "no sliding window"
            raise ModelError(
                f"attention of {call.caller} is under a mask that is not causal with {declared}, as it declares",
                "Only causal and sliding-window masks are shared.",
            )


# Keyword arguments of the attention interface that don't change the result of causal attention over packed tokens.
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
    """The function that transformers calls instead of attention; it adds one marker node to the graph.

    Raises:
        ModelError: the call has a mask, or tensors that are not supported.
    """
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
    """A one-line reason why the model's code can't be exported."""
    text = str(error).strip()
    if branches_on_values(error):
        code = branching_line(error)
        return "its code branches on the values of tensors" + (f" ({code})" if code else "")
    if is_constraint_violation(error):
        guard = violated_guard(error)
        return "its code depends on the number of tokens T" + (f" ({_short(guard)})" if guard else "")
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _short(guard: str) -> str:
    plain = guard.replace("L['input_ids'].size()[1]", "T").rstrip(".")
    return plain if len(plain) <= 80 else plain[:77] + "..."
