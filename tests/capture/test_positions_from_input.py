"""positions_from_input: row counts become the position input; counts that pick rows stay, with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from lragent.capture.context import CaptureContext
from lragent.capture.positions_from_input import POSITIONS_FROM_INPUT
from lragent.graph.passes import PassReport, run_pass
from lragent.graph.plain_graph import plain_graph

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
ROWS = torch.arange(6)[None]


class Counts(nn.Module):
    """Adds the embedding of each row's number, counted from `first`."""

    def __init__(self, first: int = 2, batched: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(10, 4), nn.Embedding(32, 4)
        self.first, self.batched = first, batched

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        row = torch.arange(input_ids.shape[1])
        if self.batched:
            row = row[None]
        return self.tokens(input_ids) + self.places(row + self.first)


class PicksRows(Counts):
    """The near miss: the count indexes a tensor of the tokens."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)[:, torch.arange(input_ids.shape[1])]


class Reads(Counts):
    """Positions are read from the input already."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.places(position_ids + self.first)


def _graph(model: nn.Module) -> fx.GraphModule:
    tokens = torch.export.Dim("T", min=2, max=20)
    shapes = {"input_ids": {1: tokens}, "position_ids": {1: tokens}}
    return plain_graph(torch.export.export(model, (IDS, ROWS), dynamic_shapes=shapes, strict=False))


def _run(graph: fx.GraphModule) -> PassReport:
    return run_pass(POSITIONS_FROM_INPUT, graph, CaptureContext(max_positions=32))


@pytest.mark.parametrize(("batched", "places"), [(False, 2), (True, 3)])  # arange and add; unsqueeze between them
def test_match_reads_positions_from_the_input(batched: bool, places: int) -> None:
    model = Counts(batched=batched)
    graph = _graph(model)
    assert torch.equal(graph(IDS, ROWS + 7), model(IDS, ROWS))
    report = _run(graph)
    assert (report.changed, report.misses) == (places, ())
    assert torch.equal(graph(IDS, ROWS), model(IDS, ROWS))
    model.first += 7
    assert torch.equal(graph(IDS, ROWS + 7), model(IDS, ROWS))


def test_near_miss_a_count_that_picks_rows_stays() -> None:
    graph = _graph(PicksRows())
    before = graph(IDS, ROWS)
    report = _run(graph)
    (miss,) = report.misses
    assert report.changed == 0
    assert miss.where == "row count" and "arange" in miss.node and "it indexes a tensor" in miss.reason
    assert torch.equal(graph(IDS, ROWS + 7), before)


def test_graph_that_reads_its_positions_is_unchanged() -> None:
    graph = _graph(Reads())
    nodes = [n.name for n in graph.graph.nodes]
    assert _run(graph) == PassReport(0)
    assert [n.name for n in graph.graph.nodes] == nodes
