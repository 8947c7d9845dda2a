"""Runs the passes: `Captured -> Transformed`."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lragent.capture import Captured
from lragent.errors import InternalError, SplitRefused
from lragent.kernels.cache_schema import CacheSchema, Layout
from lragent.load import LoadedModel
from lragent.passes import PASSES
from lragent.passes.base import Adapter, KeyTransform, Miss, PassContext, PassReport, PassState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyFacts:
    """One attention op, for reports: which projections' LR columns it reads, and its key transform."""

    index: int
    k_module: str | None
    v_module: str | None
    key_transform: str


@dataclass(frozen=True)
class Transformed:
    """A graph that takes the inputs of `lragent.kernels.step` and returns logits `[R, vocab]`."""

    graph: fx.GraphModule
    schema: CacheSchema
    layers: tuple[KeyFacts, ...]
    reports: Mapping[str, PassReport]
    loaded: LoadedModel
    attention: str


def pass_context(loaded: LoadedModel, layout: Layout, attention: str) -> PassContext:
    """What the passes must know of a loaded model."""
    return PassContext(
        layout=layout,
        agents=tuple(agent.name for agent in loaded.agents),
        adapters={
            module: {name: Adapter(w.a, w.b * w.scaling) for name, w in by_agent.items()}
            for module, by_agent in loaded.lora.items()
        },
        lora_parameters=loaded.lora_parameters,
        captured_scaling={m: frozenset(w.scaling for w in by_agent.values()) for m, by_agent in loaded.lora.items()},
        max_positions=loaded.max_positions,
        attention=attention,
    )


def transform(captured: Captured, layout: Layout, attention: str) -> Transformed:
    """Runs all passes on a copy of the captured graph (tensors are shared).

    Raises:
        SplitRefused: an adapter's computation or a K/V stream was not recognised; names every layer, node and reason.
    """
    loaded = captured.loaded
    shared = {id(t): t for t in (*captured.graph.parameters(), *captured.graph.buffers())}
    graph = copy.deepcopy(captured.graph, shared)
    graph.graph.set_codegen(fx.graph.CodeGen())  # plain positional inputs instead of the exporter's pytrees
    context, state = pass_context(loaded, layout, attention), PassState()
    reports: dict[str, PassReport] = {}
    for entry in PASSES:
        started = time.perf_counter()
        try:
            reports[entry.name] = entry.run(graph, context, state)
            graph.graph.lint()
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            raise InternalError(f"pass {entry.name} failed on {loaded.architecture}: {error}") from error
        log.info("%s: %d changed in %.2f s", entry.name, reports[entry.name].changed, time.perf_counter() - started)
        if entry.name in ("route_adapters", "split_kv"):
            _refuse(reports[entry.name].misses, entry.name, loaded)
    graph.recompile()
    return Transformed(
        graph=graph,
        schema=CacheSchema(layout, context.agents, state.base_streams, state.low_rank_streams),
        layers=_layer_facts(state),
        reports=reports,
        loaded=loaded,
        attention=attention,
    )


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


def _layer_facts(state: PassState) -> tuple[KeyFacts, ...]:
    facts = []
    for index, (key, value) in enumerate(state.split.values()):
        kind = key.transform.kind if isinstance(key.transform, KeyTransform) else "not needed (K has no adapter)"
        facts.append(
            KeyFacts(
                index=index,
                k_module=key.routed.module if key.routed else None,
                v_module=value.routed.module if value.routed else None,
                key_transform=kind,
            )
        )
    return tuple(facts)


def parameters_of(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    """All tensors that a transformed graph reads, by name."""
    return {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers(remove_duplicate=False))}
