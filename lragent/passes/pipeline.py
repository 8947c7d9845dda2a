"""Runs the passes: `Captured -> Transformed`, and a transformed graph -> one that is lowered for a target."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lragent.adapter_weights import LoraWeights
from lragent.capture import Captured
from lragent.errors import InternalError, SplitRefused
from lragent.exporter_noise import without_exporter_noise
from lragent.hooks import HOOK_SCALING
from lragent.kernels.cache_schema import CacheSchema, Layout
from lragent.loading import LoadedModel
from lragent.passes import LOWER, REWRITE
from lragent.passes.base import Adapter, KeyTransform, Miss, Pass, PassContext, PassReport, PassState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerFacts:
    """One attention op, for reports: which projections' LR columns it reads, and its key transform."""

    index: int
    k_module: str | None
    v_module: str | None
    key_transform: str


@dataclass(frozen=True)
class Transformed:
    """A rewritten graph, not yet lowered: takes the inputs of `lragent.kernels.step`, returns logits `[R, vocab]`."""

    graph: fx.GraphModule
    schema: CacheSchema
    layers: tuple[LayerFacts, ...]
    reports: Mapping[str, PassReport]


def transform(captured: Captured, layout: Layout) -> Transformed:
    """Runs the rewriting passes on a copy of the captured graph (tensors are shared).

    Raises:
        SplitRefused: an adapter's computation or a K/V stream was not recognised; names every layer, node and reason.
    """
    loaded = captured.loaded
    graph = _copy(captured.graph)
    context, state = pass_context(loaded, layout), PassState()
    reports: dict[str, PassReport] = {}
    for entry in REWRITE:
        reports[entry.name] = _run(entry, graph, context, state)
        if entry.name in ("route_adapters", "split_kv"):
            _refuse(reports[entry.name].misses, entry.name, loaded)
    _drop_unused(graph)
    return Transformed(
        graph=graph,
        schema=CacheSchema(layout, context.agents, state.base_streams, state.low_rank_streams),
        layers=_layer_facts(state),
        reports=reports,
    )


def lower(graph: fx.GraphModule, attention: str) -> fx.GraphModule:
    """Lowers a copy of a rewritten graph (tensors are shared) to an attention implementation."""
    lowered = _copy(graph)
    context = PassContext("dense", (), {}, {}, {}, 0, attention)
    for entry in LOWER:
        _run(entry, lowered, context, PassState())
    lowered.recompile()
    return lowered


def pass_context(loaded: LoadedModel, layout: Layout, attention: str = "reference") -> PassContext:
    """What the passes must know of a loaded model."""
    return PassContext(
        layout=layout,
        agents=tuple(agent.name for agent in loaded.agents),
        adapters={
            module: {name: adapter(weights) for name, weights in by_agent.items()}
            for module, by_agent in loaded.lora.items()
        },
        lora_parameters=loaded.lora_parameters,
        captured_scaling={module: frozenset({HOOK_SCALING}) for module in (*loaded.lora, *loaded.rows)},
        max_positions=loaded.max_positions,
        attention=attention,
        rows=loaded.rows,
        groups=loaded.groups,
    )


def adapter(weights: LoraWeights) -> Adapter:
    """The form that passes read: a constant becomes one more column of B, over a column of `x A` that is always 1."""
    a, b = weights.a, weights.b * weights.scaling
    if weights.constant is None:
        return Adapter(a, b, gain=weights.gain)
    column = weights.constant if weights.gain is None else weights.constant / weights.gain
    ones = torch.cat([a.new_zeros(a.shape[0]), a.new_ones(1)])
    return Adapter(torch.cat([a, a.new_zeros(1, a.shape[1])]), torch.cat([b, column[:, None]], 1), ones, weights.gain)


def _copy(graph: fx.GraphModule) -> fx.GraphModule:
    shared = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    with without_exporter_noise():
        return copy.deepcopy(graph, shared)


def _run(entry: Pass, graph: fx.GraphModule, context: PassContext, state: PassState) -> PassReport:
    started = time.perf_counter()
    try:
        report = entry.run(graph, context, state)
        graph.graph.lint()
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise InternalError(f"pass {entry.name} failed: {type(error).__name__}: {error}") from error
    log.info("%s: %d changed in %.2f s", entry.name, report.changed, time.perf_counter() - started)
    return report


def _drop_unused(graph: fx.GraphModule) -> None:
    """Removes code and tensors that the rewritten graph does not use: adapters' own weights, folded deltas."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for prefix, module in list(graph.named_modules()):
        for held in (module._parameters, module._buffers):
            for name in [n for n in held if (f"{prefix}.{n}" if prefix else n) not in used]:
                del held[name]
    graph.recompile()


def _refuse(misses: tuple[Miss, ...], entry: str, loaded: LoadedModel) -> None:
    if not misses:
        return
    shown = "; ".join(str(miss) for miss in misses[:4]) + (f"; and {len(misses) - 4} more" if len(misses) > 4 else "")
    hint = (
        "Use layout dense (sharing non_shared or full_shared), or leave these projections out of the adapters."
        if entry == "split_kv"
        else "Leave these modules out of the adapters' target_modules."
    )
    raise SplitRefused(f"{loaded.architecture} can't be split: {shown}", hint, misses)


def _layer_facts(state: PassState) -> tuple[LayerFacts, ...]:
    facts = []
    for index, (key, value) in enumerate(state.split.values()):
        kind = key.transform.kind if isinstance(key.transform, KeyTransform) else "not needed (K has no adapter)"
        facts.append(
            LayerFacts(
                index=index,
                k_module=key.routed.module if key.routed else None,
                v_module=value.routed.module if value.routed else None,
                key_transform=kind,
            )
        )
    return tuple(facts)
