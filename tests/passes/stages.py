"""Runs a tiny model up to a pass, and executes graphs before and after they have a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lragent.capture.capture import Captured, capture
from lragent.graph.passes import PassReport
from lragent.loading.model import load_live
from lragent.passes import LOWER, REWRITE
from lragent.passes.contract import LowerContext, PassState, RewriteContext
from lragent.passes.pipeline import rewrite_context
from lragent.program.cache_schema import CacheSchema, Layout
from lragent.program.step import CacheTensors, StepInputs
from tests.passes.tiny_lm import Tiny

PAGE = 16


def captured(model: Any) -> Captured:
    return capture(load_live(model))


def run_until(
    source: Captured, last: str, layout: Layout = "split"
) -> tuple[fx.GraphModule, PassReport, RewriteContext, PassState]:
    """Runs the passes up to and including `last`; returns the graph and the report of `last`.

    Lowering passes lower to the implementation "reference".
    """
    graph = source.graph
    context = rewrite_context(source.loaded, layout)
    report = PassReport(0)
    rewriting = [(entry.name, partial(entry.run, graph, context)) for entry in REWRITE]
    lowering = [(entry.name, partial(entry.run, graph, LowerContext("reference"))) for entry in LOWER]
    for name, run in (*rewriting, *lowering):
        report = run()
        graph.graph.lint()
        if name == last:
            break
    graph.recompile()
    return graph, report, context, context.state


def split_report(**paths: Any) -> tuple[PassReport, PassState]:
    """Runs a tiny model, built with these paths of K and V, up to `split_kv`."""
    _, report, _, state = run_until(captured(Tiny(**paths).build()), "split_kv")
    return report, state


def call(graph: fx.GraphModule, **values: Tensor) -> Tensor:
    """Calls a graph by placeholder name."""
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    return graph(*(values[name] for name in names))


def run_cached(graph: fx.GraphModule, schema: CacheSchema, ids_T: Tensor, agent: int, cut: int) -> Tensor:
    """Logits of all tokens of one sequence, run in two chunks split at `cut` over a fresh paged cache."""
    pages = len(ids_T) // PAGE + 3
    cache = CacheTensors(
        k_base=tuple(torch.zeros(pages, b.kv_heads, PAGE, b.k_dim) for b in schema.base),
        v_base=tuple(torch.zeros(pages, b.kv_heads, PAGE, b.v_dim) for b in schema.base),
        low_rank=tuple(torch.zeros(s.elements("distinct", pages, PAGE)) for s in schema.low_rank),
        lr_directories=tuple(s.lr_directory("distinct", pages, PAGE) for s in schema.low_rank),
    )
    order = torch.arange(1, pages)
    rows = []
    for start, end in ((0, cut), (cut, len(ids_T))):
        at = torch.arange(start, end)
        slots = order[at // PAGE] * PAGE + at % PAGE
        step = StepInputs(
            token_ids=ids_T[start:end],
            positions=at,
            agent_ids=torch.full_like(at, agent),
            logits_rows=torch.arange(end - start),
            base_slots=slots,
            lr_slots=slots.repeat(len(schema.agents), 1),
            seq_starts=torch.tensor([0, end - start]),
            context_lens=torch.tensor([end]),
            page_table=order[None],
        )
        with torch.no_grad():
            rows.append(graph(*step.tensors(), *cache.tensors()))
    return torch.cat(rows)


def peft_logits(model: Any, ids_T: Tensor, agent: str | None) -> Tensor:
    """What PEFT computes for one agent (None: the base model), `[T, vocab]`."""
    ids, positions = ids_T[None], torch.arange(len(ids_T))[None]
    with torch.no_grad():
        if agent is None:
            with model.disable_adapter():
                return model(input_ids=ids, position_ids=positions).logits[0]
        model.set_adapter(agent)
        return model(input_ids=ids, position_ids=positions).logits[0]


def allowed(model: Any, ids_T: Tensor, agent: str | None) -> float:
    """Four times what PEFT in float32 differs from PEFT in float64."""
    import copy

    single = peft_logits(model, ids_T, agent)
    double = peft_logits(copy.deepcopy(model).double(), ids_T, agent)
    return 4 * float((single.double() - double).abs().max())
