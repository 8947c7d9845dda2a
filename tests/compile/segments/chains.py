"""Tiny models lowered and cut, and the chain of their segments as one callable, nothing compiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, fx

from lragent.capture.capture import capture
from lragent.compile.aoti_package import Run
from lragent.compile.export import example_step, tensors_of
from lragent.compile.segments.build import GraphSegment
from lragent.compile.segments.compile_segments import calls_of, segments_of
from lragent.compile.segments.kinds import kinds
from lragent.compile.segments.plan import SegmentPlan
from lragent.compile.segments.run import SegmentsCall, bind
from lragent.files.checked_file import FileEntry
from lragent.loading.model import load_directories
from lragent.passes.pipeline import Transformed, lower, transform
from lragent.program.cache_schema import CacheSchema
from lragent.program.step import PAGE_SIZE, STEP_INPUTS, StepKind, cache_input_names
from lragent.runtime.cache.memory import allocate
from tests.models import write_model


@dataclass(frozen=True)
class Chain:
    """A lowered graph and its segments."""

    whole: fx.GraphModule
    schema: CacheSchema
    segments: list[GraphSegment]
    result: str

    @property
    def kinds(self) -> list[int]:
        return kinds(self.segments)

    def call(self) -> SegmentsCall:
        """Runs each kind's first segment in place of all that are the same."""
        firsts, calls = calls_of(self.segments)
        runs = [_run(self.segments[first].graph) for first in firsts]
        plan = SegmentPlan(tuple(FileEntry("", 0, "") for _ in firsts), calls, self.result)
        return bind(plan, runs, tensors_of(self.whole), (*STEP_INPUTS, *cache_input_names(self.schema)))


def _run(graph: fx.GraphModule) -> Run:
    return lambda given: list(graph(*given))


@cache
def written(kind: str, layers: int) -> Transformed:
    """A tiny model with three adapters, rewritten for split layout."""
    with TemporaryDirectory() as folder:
        model = write_model(Path(folder), kind, layers=layers)
        return transform(capture(load_directories(model.model_dir, model.adapters, "float32")), "split")


def chain(program: Transformed, graph_name: str, steps: StepKind = "any") -> Chain:
    graph = lower(program.graph, graph_name).graph
    return Chain(graph, program.schema, *segments_of(graph, program.schema, torch.float32, steps))


def results(chain: Chain, seqs: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and cache after a step, of the whole graph and of the chain, from the same random cache."""
    found = []
    for call in (chain.whole, chain.call()):
        torch.manual_seed(0)
        cache = allocate(chain.schema, "per_agent", 3 + seqs, PAGE_SIZE, torch.float32, torch.device("cpu")).tensors
        for tensor in (*cache.k_base, *cache.v_base, *cache.low_rank):
            tensor.normal_()
        step = example_step(len(chain.schema.agents), seqs, tokens)
        step.token_ids.copy_(torch.arange(seqs * tokens) * 7 % 64)
        step.agent_ids.copy_(torch.arange(seqs * tokens) // tokens % 3)
        step.logits_rows.fill_(seqs * tokens - 1)
        with torch.no_grad():
            logits = call(*step.tensors(), *cache.tensors())
        found.append([logits, *cache.tensors()])
    return found[0], found[1]
