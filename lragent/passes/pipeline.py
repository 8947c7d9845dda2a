"""Runs the passes: a loaded model -> one rewritten graph per layout, and a rewritten graph -> a lowered one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx, nn

from lragent.capture.capture import Captured, capture
from lragent.compat.transformers import embedding_scale
from lragent.errors import InternalError, Miss, SplitRefused
from lragent.graph.adapter_marker import adapter_markers
from lragent.graph.passes import Context, Pass, PassReport, run_pass
from lragent.graph.quiet_export import without_exporter_noise
from lragent.kernels.implementations import GRAPHS
from lragent.loading.adapter_weights import LoraWeights
from lragent.loading.agent_slots import groups_of
from lragent.loading.model import LoadedModel
from lragent.loading.stages import Stages
from lragent.passes import LOWER, REWRITE
from lragent.passes.contract import Adapter, KeyTransform, LowerContext, PassState, RewriteContext
from lragent.passes.lower_attention import LOWER_ATTENTION, fallback_layers
from lragent.program.adapter_map import AdapterMap, RoutedConstants
from lragent.program.cache_schema import CacheSchema, Layout
from lragent.program.dtypes import LAYOUTS
from lragent.program.layer_facts import LayerFacts

MOST_MISSES = 4  # named in the message of SplitRefused


@dataclass(frozen=True)
class Transformed:
    """A rewritten graph, not yet lowered: takes the inputs of `lragent.program.step`, returns logits `[R, vocab]`.

    Args:
        reports: pass name -> report of each rewriting pass.
        adapter_map: the constants of the graph that follow from the adapters' A and B.
        fallbacks: name of a graph (`dispatch.graphs`) -> the layers that run `implementations.FALLBACK` once lowered
            for it; graphs without such layers are missing.
    """

    graph: fx.GraphModule
    schema: CacheSchema
    layers: tuple[LayerFacts, ...]
    reports: Mapping[str, PassReport]
    adapter_map: AdapterMap
    fallbacks: Mapping[str, tuple[Miss, ...]]

    @property
    def misses(self) -> tuple[Miss, ...]:
        """Places where a rewriting pass did not match; the program is correct there, and slower."""
        return tuple(miss for report in self.reports.values() for miss in report.misses)


@dataclass(frozen=True)
class Rewritten:
    """A model's programs by layout.

    Args:
        refusal: the message of the error that refused split layout; "" if there was none.
        refused: every place for which it was refused.
    """

    programs: Mapping[Layout, Transformed]
    refusal: str = ""
    refused: tuple[Miss, ...] = ()

    @property
    def split_map(self) -> AdapterMap | None:
        """The adapter map of the program in split layout; None if there is none."""
        return self.programs["split"].adapter_map if "split" in self.programs else None


@dataclass(frozen=True)
class Lowered:
    """A graph lowered to an attention implementation, and the report of each lowering pass by its name."""

    graph: fx.GraphModule
    reports: Mapping[str, PassReport]

    @property
    def fallback(self) -> tuple[Miss, ...]:
        """The layers that run `implementations.FALLBACK` instead of the chosen implementation."""
        return self.reports[LOWER_ATTENTION.name].misses


def rewrite(loaded: LoadedModel, wanted: Sequence[Layout], stages: Stages) -> Rewritten:
    """Captures a model and rewrites it for every layout that its graph allows.

    Raises:
        SplitRefused: a layout in `wanted` is refused, or dense layout is.
    """
    captured = stages.run("capture", lambda: capture(loaded))
    programs: dict[Layout, Transformed] = {}
    refusal: SplitRefused | None = None
    for layout in LAYOUTS:
        try:
            programs[layout] = stages.run(f"rewrite {layout}", partial(transform, captured, layout))
        except SplitRefused as error:
            if layout in wanted or layout == "dense":
                raise
            refusal = error
    return Rewritten(programs) if refusal is None else Rewritten(programs, refusal.message, refusal.misses)


def transform(captured: Captured, layout: Layout) -> Transformed:
    """Runs the rewriting passes on a copy of the captured graph (tensors are shared).

    Raises:
        SplitRefused: an adapter's computation or a K/V stream was not recognised; holds every layer, node and reason.
    """
    graph = copied(captured.graph)
    context = rewrite_context(captured.loaded, layout)
    reports = _run_all(REWRITE, graph, context, captured.loaded.architecture)
    _drop_unused(graph)
    _require_routed(graph)
    state = context.state
    return Transformed(
        graph=graph,
        schema=CacheSchema(layout, context.agents, state.base_streams, state.low_rank_streams),
        layers=_layer_facts(state),
        reports=reports,
        adapter_map=_adapter_map(graph, context, captured.loaded),
        fallbacks={name: found for name in GRAPHS if (found := fallback_layers(graph, name))},
    )


def lower(graph: fx.GraphModule, attention: str) -> Lowered:
    """Lowers a copy of a rewritten graph (tensors are shared) to an attention implementation.

    Args:
        attention: name of one of the implementation's graphs (`dispatch.graphs`).
    """
    lowered = copied(graph)
    reports = _run_all(LOWER, lowered, LowerContext(attention), "the graph")
    lowered.recompile()
    return Lowered(lowered, reports)


def rewrite_context(loaded: LoadedModel, layout: Layout) -> RewriteContext:
    """The facts of a loaded model that rewriting passes read, and an empty state."""
    adapted = {module: loaded.model.get_submodule(module).base_layer for module in (*loaded.lora, *loaded.rows)}
    return RewriteContext(
        layout=layout,
        agents=tuple(agent.name for agent in loaded.agents),
        adapters={
            module: {name: adapter(weights) for name, weights in by_agent.items()}
            for module, by_agent in loaded.lora.items()
        },
        max_positions=loaded.max_positions,
        embeddings={module: base.num_embeddings for module, base in adapted.items() if isinstance(base, nn.Embedding)},
        rows=loaded.rows,
        groups=groups_of(loaded),
    )


def adapter(weights: LoraWeights) -> Adapter:
    """Converts weights into the form that passes read. A constant becomes a column of B whose LR number is always 1."""
    a, b = weights.a, weights.b * weights.scaling
    if weights.constant is None:
        return Adapter(a, b, gain=weights.gain)
    column = weights.constant if weights.gain is None else weights.constant / weights.gain
    ones = torch.cat([a.new_zeros(a.shape[0]), a.new_ones(1)])
    return Adapter(torch.cat([a, a.new_zeros(1, a.shape[1])]), torch.cat([b, column[:, None]], 1), ones, weights.gain)


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that can be rewritten; tensors are shared."""
    shared = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    with without_exporter_noise():
        return copy.deepcopy(graph, shared)


def _run_all(
    passes: Sequence[Pass[Context]], graph: fx.GraphModule, context: Context, subject: str
) -> dict[str, PassReport]:
    """Runs passes in order and returns their reports by name; `subject` begins the message of a refusal."""
    reports: dict[str, PassReport] = {}
    for entry in passes:
        reports[entry.name] = report = run_pass(entry, graph, context)
        if entry.required and report.misses:
            raise SplitRefused(f"{subject} can't be split: {_shown(report.misses)}", entry.hint, report.misses)
    return reports


def _shown(misses: Sequence[Miss]) -> str:
    shown = "; ".join(map(str, misses[:MOST_MISSES]))
    more = len(misses) - MOST_MISSES
    return f"{shown}; and {more} more; `lragent inspect MODEL --adapters ...` lists all" if more > 0 else shown


def _drop_unused(graph: fx.GraphModule) -> None:
    """Removes code and tensors that the rewritten graph does not use, such as folded deltas."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for prefix, module in list(graph.named_modules()):
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name in [n for n, _ in (*parameters, *buffers) if (f"{prefix}.{n}" if prefix else n) not in used]:
            delattr(module, name)
    graph.recompile()


def _adapter_map(graph: fx.GraphModule, context: RewriteContext, loaded: LoadedModel) -> AdapterMap:
    """The map of the constants that are left in the graph; call after `_drop_unused`."""
    left = {name for name, _ in graph.named_buffers()}
    gains = (module for module, by_agent in context.adapters.items() for a in by_agent.values() if a.gain is not None)

    def scale(entry: RoutedConstants) -> float:
        return embedding_scale(loaded.model.get_submodule(entry.stream.module).base_layer)

    return AdapterMap(
        routed=tuple(replace(e, scale=scale(e)) for e in context.state.routed if left & {e.a, e.b}),
        attention=tuple(entry for entry in context.state.lora_b if entry.name in left),
        fixed=tuple(dict.fromkeys((*gains, *context.rows))),
    )


def _require_routed(graph: fx.GraphModule) -> None:
    """Raises InternalError if an adapter marker is left; its computation belongs to no agent."""
    left = adapter_markers(graph)
    if left:
        raise InternalError(f"the adapter marker of {left[0].args[2]} is left in the rewritten graph")


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
